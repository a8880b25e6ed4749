"""Q-functions as conditional networks equal the paper's formulas, in value and in where they begin."""

from functools import partial

import pytest
import torch
from torch import nn

from lightning_hyper.modules import Spaces
from lightning_hyper.modules.critic import TwinCritic, frozen
from lightning_hyper.nn import D2RL, Concat, Hyper, MLPTrunk, ResidualTrunk

SPACES = Spaces(observation=5, task=0, actions=3, discrete=False, low=(-1.0,) * 3, high=(1.0,) * 3)
PAPER = partial(Hyper, hidden=[256], activation="relu", init="sarafian", gain=True, trunk=ResidualTrunk)
SMALL = partial(
    Hyper, hidden=[8], activation="relu", init="sarafian", gain=True, trunk=partial(ResidualTrunk, widths=(6, 7)),
)  # fmt: skip


def linears(network):
    return [layer for layer in network.modules() if isinstance(layer, nn.Linear)]


def perturbed(module):
    """With nothing left at zero, which would hide a term."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return module


def affine(layer, x):
    return x @ layer.weight.T + layer.bias


def residual(trunk, x, stages, blocks=2):
    layers = iter(linears(trunk))
    for _ in range(stages):
        x = affine(next(layers), x)
        for _ in range(blocks):
            first, second = next(layers), next(layers)
            x = x + affine(second, affine(first, x.clamp(min=0)).clamp(min=0))
    rest = list(layers)
    return affine(rest[0], x) if rest else x


def generated(net, x, z):
    """(W(z) x)(1 + s(z)) + b(z) of every layer, a ReLU in between, with W, s and b written out for each row."""
    outputs = []
    for row in range(len(x)):
        h = x[row]
        for k, layer in enumerate(net.layers):
            weight = affine(layer.weight, z[row]).reshape(-1, len(h))
            h = (weight @ h) * (1 + affine(layer.gain, z[row])) + affine(layer.bias, z[row])
            if k < len(net.layers) - 1:
                h = h.clamp(min=0)
        outputs.append(h[0])
    return torch.stack(outputs)


@pytest.mark.parametrize("order", ["SA", "AS", "constant"])
@pytest.mark.parametrize("network", [PAPER, SMALL])
@pytest.mark.parametrize("shared_trunk", [False, True])
@torch.no_grad()
def test_values_equal_the_formula(order, network, shared_trunk):
    critic = perturbed(TwinCritic(SPACES, network, order=order, shared_trunk=shared_trunk))
    state, action = torch.randn(4, 5), torch.rand(4, 3) * 2 - 1
    stages = 3 if network is PAPER else 2
    expected = []
    for k, net in enumerate((critic.first, critic.second)):
        if order == "constant":
            x, context = torch.cat([state, action], 1), critic.constants[k].expand(4, 5)
        else:
            x, context = (action, state) if order == "SA" else (state, action)
        expected.append(generated(net, x, residual(net.trunk, context, stages)))
    values = critic(state, action)
    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value, other, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(*values)
    torch.testing.assert_close(critic.value(state, action), values[0])


def test_the_network_of_the_paper_has_its_sizes():
    net = TwinCritic(SPACES, PAPER).first
    widths = [(layer.in_features, layer.out_features) for layer in linears(net.trunk)]
    assert widths == [(5, 256), *[(256, 256)] * 4, (256, 512), *[(512, 512)] * 4, (512, 1024), *[(1024, 1024)] * 4]
    heads = [(h.in_features, h.out_features) for layer in net.layers for h in (layer.weight, layer.gain, layer.bias)]
    assert heads == [(1024, 3 * 256), (1024, 256), (1024, 256), (1024, 256), (1024, 1), (1024, 1)]


def assert_uniform(weight, bound):
    """Within the bound, and with the moments of a uniform distribution."""
    assert weight.abs().max() <= bound
    few = 6 / weight.numel() ** 0.5  # six standard errors are below this for mean and variance alike
    assert weight.mean().abs() <= few * bound
    assert weight.var().item() == pytest.approx(bound**2 / 3, rel=max(few, 0.01))


@pytest.mark.parametrize(("scale", "factor"), [("td3", 4), ("sac", 2)])
def test_networks_begin_as_the_paper_says(scale, factor):
    net = PAPER(3, 5, 1, trunk=partial(ResidualTrunk, scale=scale))
    for layer in linears(net.trunk):
        assert_uniform(layer.weight, (factor * layer.in_features) ** -0.5)
    for layer, bound in zip(net.layers, (0.05, 0.008), strict=True):
        for head in (layer.weight, layer.bias, layer.gain):
            assert_uniform(head.weight, bound)
            assert not head.bias.any()


@pytest.mark.parametrize("order", ["SA", "AS", "constant"])
def test_twins_have_nothing_in_common_unless_they_share_the_trunk(order):
    apart, together = (TwinCritic(SPACES, SMALL, order=order, shared_trunk=shared) for shared in (False, True))
    assert not {id(p) for p in apart.first.parameters()} & {id(p) for p in apart.second.parameters()}
    common = {id(p) for p in together.first.parameters()} & {id(p) for p in together.second.parameters()}
    assert common == {id(p) for p in together.first.trunk.parameters()}
    trunk = sum(p.numel() for p in apart.first.trunk.parameters())
    count = {critic: sum(p.numel() for p in critic.parameters()) for critic in (apart, together)}
    assert count[apart] - count[together] == trunk


@pytest.mark.parametrize("order", ["SA", "AS"])
def test_a_shared_trunk_is_evaluated_once_and_learns_for_both(order):
    critic = TwinCritic(SPACES, SMALL, order=order, shared_trunk=True)
    calls = []
    critic.first.trunk.register_forward_hook(lambda *_: calls.append(1))
    state, action = torch.randn(6, 5), torch.randn(6, 3)
    values = critic(state, action)
    assert len(calls) == 1
    parameters = list(critic.first.trunk.parameters())
    both, one, other = (
        torch.autograd.grad(value.sum(), parameters, retain_graph=True) for value in (sum(values), *values)
    )
    for total, a, b in zip(both, one, other, strict=True):
        assert a.any()
        torch.testing.assert_close(total, a + b, atol=1e-6, rtol=1e-4)


def test_constants_learn():
    critic = TwinCritic(SPACES, SMALL, order="constant")
    sum(critic(torch.randn(6, 5), torch.randn(6, 3))).sum().backward()
    one, other = critic.constants
    assert not torch.equal(one, other)
    assert one.grad.all()
    assert other.grad.all()


@pytest.mark.parametrize("order", ["SA", "AS", "constant"])
@pytest.mark.parametrize("network", [SMALL, partial(Concat, hidden=[8])])
def test_leading_dimensions_may_be_any(order, network):
    critic = TwinCritic(SPACES, network, order=order)
    state, action = torch.randn(4, 7, 5), torch.randn(4, 7, 3)
    flat = critic(state.flatten(0, 1), action.flatten(0, 1))
    for value, other in zip(critic(state, action), flat, strict=True):
        assert value.shape == (4, 7)
        torch.testing.assert_close(value.flatten(), other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("order", "columns"), [("AS", [0, 1, 2, 3, 4, 5, 6, 7]), ("SA", [5, 6, 7, 0, 1, 2, 3, 4])])
@torch.no_grad()
def test_d2rl_shows_state_and_action_to_every_hidden_layer(order, columns):
    critic = TwinCritic(SPACES, partial(D2RL, hidden=[8, 9, 7], activation="relu"), order=order)
    state, action = torch.randn(6, 5), torch.randn(6, 3)
    for net, value in zip((critic.first, critic.second), critic(state, action), strict=True):
        one, two, three, out = linears(net)
        both = torch.cat([state, action], 1)[:, columns]
        h = affine(one, both).clamp(min=0)
        h = affine(two, torch.cat([h, both], 1)).clamp(min=0)
        h = affine(three, torch.cat([h, both], 1)).clamp(min=0)
        torch.testing.assert_close(value, affine(out, h)[:, 0], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_residual_features_go_into_a_plain_network_beside_the_action():
    trunk = partial(ResidualTrunk, widths=(6, 7), features=10)
    critic = TwinCritic(SPACES, partial(Concat, hidden=[8, 9], activation="relu", trunk=trunk), order="SA")
    state, action = torch.randn(6, 5), torch.randn(6, 3)
    for net, value in zip((critic.first, critic.second), critic(state, action), strict=True):
        z = residual(net.trunk, state, stages=2)
        assert z.shape == (6, 10)
        one, two, out = (layer for layer in linears(net) if not any(layer is t for t in linears(net.trunk)))
        h = affine(two, affine(one, torch.cat([action, z], 1)).clamp(min=0)).clamp(min=0)
        torch.testing.assert_close(value, affine(out, h)[:, 0], atol=1e-6, rtol=1e-5)


def test_values_are_float32_under_autocast():
    critic = TwinCritic(SPACES, SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        values = (*critic(torch.randn(6, 5), torch.randn(6, 3)), critic.value(torch.randn(6, 5), torch.randn(6, 3)))
    assert {value.dtype for value in values} == {torch.float32}


def test_frozen_lets_gradients_through_and_gives_parameters_back_as_they_were():
    critic = TwinCritic(SPACES, SMALL)
    held = critic.second.layers[0].weight.bias.requires_grad_(False)
    action = torch.randn(6, 3, requires_grad=True)
    with frozen(critic):
        assert not any(p.requires_grad for p in critic.parameters())
        sum(critic(torch.randn(6, 5), action)).sum().backward()
    assert action.grad.any()
    assert all(p.grad is None for p in critic.parameters())
    assert [id(p) for p in critic.parameters() if not p.requires_grad] == [id(held)]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"order": "SAS"}, "model.order is 'SAS'; choose one of SA, AS, constant"),
        ({"shared_trunk": True, "network": partial(Hyper, hidden=[8])}, "model.shared_trunk: .* Hyper has none"),
        ({"network": partial(Hyper, trunk=partial(ResidualTrunk, widths=()))}, "trunk.widths"),
        ({"network": partial(Hyper, trunk=partial(ResidualTrunk, scale="ppo"))}, "trunk.scale is 'ppo'"),
        ({"network": partial(Hyper, trunk=partial(MLPTrunk, widths=(0,)))}, "widths is"),
    ],
)
def test_impossible_options_name_the_key(options, key):
    with pytest.raises(ValueError, match=key):
        TwinCritic(SPACES, **{"network": SMALL, **options})
