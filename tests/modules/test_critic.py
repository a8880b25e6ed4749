"""Q-functions as conditional networks equal the paper's formulas, in value and in where they begin."""

from functools import partial

import pytest
import torch
from torch import nn

from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.modules import Contexts, RunningNorm
from lightning_hyper.modules.critic import TwinCritic, frozen
from lightning_hyper.nn import D2RL, MLP, Concat, ContextOnly, Hyper, ResidualTrunk, VectorEncoder

SPACES = Spaces(observation=(5,), actions=3, discrete=False, low=(-1.0,) * 3, high=(1.0,) * 3)
PAPER = partial(Hyper, hidden=[256], activation="relu", init="sarafian", gain=True, trunk=ResidualTrunk)
SMALL = partial(
    Hyper, hidden=[8], activation="relu", init="sarafian", gain=True, trunk=partial(ResidualTrunk, widths=(6, 7)),
)  # fmt: skip


class Bilinear(nn.Module):
    """A user's own."""

    def __init__(self, inputs, context, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, context))

    def forward(self, x, context):
        return ((x @ self.weight) * context).sum(-1, keepdim=True)


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


def values(critic, state, action, task=None):
    return critic({"observation": state}, action, None if task is None else Contexts(task))


@pytest.mark.parametrize(
    ("context", "inputs"),
    [
        (["state"], ["action"]),
        (["action"], ["state"]),
        (["constant"], ["state", "action"]),
        (["action", "constant"], ["state"]),
        (["task"], ["state", "action"]),
        (["state", "task"], ["action"]),
        (["task", "action", "constant"], ["state"]),
        (["state", "action"], ["task"]),
        (["state"], ["action", "task"]),
        (["constant"], ["state", "action", "task"]),
    ],
)
@pytest.mark.parametrize("network", [PAPER, SMALL])
@pytest.mark.parametrize("shared_trunk", [False, True])
@torch.no_grad()
def test_values_equal_the_formula(context, inputs, network, shared_trunk):
    task = torch.randn(4, 2) if "task" in [*context, *inputs] else None
    options = {"task_features": 0 if task is None else 2, "shared_trunk": shared_trunk}
    critic = perturbed(TwinCritic(SPACES, network, context=context, **options))
    parts = {"state": torch.randn(4, 5), "action": torch.rand(4, 3) * 2 - 1, "task": task}
    if "constant" in context:
        parts["constant"] = critic.constant.expand(4, 5)
    c, x = (torch.cat([parts[name] for name in names], 1) for names in (context, inputs))
    stages = 3 if network is PAPER else 2
    expected = [generated(net, x, residual(net.trunk, c, stages)) for net in (critic.first, critic.second)]
    found = values(critic, parts["state"], parts["action"], task)
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(*found)
    first = critic.value({"observation": parts["state"]}, parts["action"], None if task is None else Contexts(task))
    torch.testing.assert_close(first, found[0])


@pytest.mark.parametrize("shared_trunk", [False, True])
@torch.no_grad()
def test_weights_of_a_task_that_frames_share_are_generated_once(shared_trunk):
    critic = perturbed(TwinCritic(SPACES, SMALL, context=["task"], task_features=2, shared_trunk=shared_trunk))
    tasks, index = torch.randn(3, 2), torch.randint(3, (20,))
    rows = []
    for net in (critic.first, critic.second):
        net.layers[0].weight.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    state, action = torch.randn(20, 5), torch.randn(20, 3)
    few = critic({"observation": state}, action, Contexts(tasks, index))
    assert rows == [3, 3]
    for value, other in zip(few, values(critic, state, action, tasks[index]), strict=True):
        torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_state_is_standardised_as_the_policys_and_encoded_by_an_encoder_of_its_own():
    norm = RunningNorm(5)
    norm.update(3 * torch.randn(50, 5) + 1)
    critic = TwinCritic(SPACES, SMALL, encoder=partial(VectorEncoder, widths=[4]), norm=norm)
    state, action = torch.randn(6, 5), torch.randn(6, 3)
    for net, value in zip((critic.first, critic.second), values(critic, state, action), strict=True):
        expected = net(action, critic.observation.encoder(norm(state)))[:, 0]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


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


@pytest.mark.parametrize("context", ["state", "action", "constant"])
def test_twins_have_nothing_in_common_unless_they_share_the_trunk(context):
    apart, together = (TwinCritic(SPACES, SMALL, context=[context], shared_trunk=shared) for shared in (False, True))
    assert not {id(p) for p in apart.first.parameters()} & {id(p) for p in apart.second.parameters()}
    common = {id(p) for p in together.first.parameters()} & {id(p) for p in together.second.parameters()}
    assert common == {id(p) for p in together.first.trunk.parameters()}
    trunk = sum(p.numel() for p in apart.first.trunk.parameters())
    count = {critic: sum(p.numel() for p in critic.parameters()) for critic in (apart, together)}
    assert count[apart] - count[together] == trunk


@pytest.mark.parametrize("context", ["state", "action"])
def test_a_shared_trunk_is_evaluated_once_and_learns_for_both(context):
    critic = TwinCritic(SPACES, SMALL, context=[context], shared_trunk=True)
    calls = []
    critic.first.trunk.register_forward_hook(lambda *_: calls.append(1))
    state, action = torch.randn(6, 5), torch.randn(6, 3)
    found = values(critic, state, action)
    assert len(calls) == 1
    parameters = list(critic.first.trunk.parameters())
    both, one, other = (
        torch.autograd.grad(value.sum(), parameters, retain_graph=True) for value in (sum(found), *found)
    )
    for total, a, b in zip(both, one, other, strict=True):
        assert a.any()
        torch.testing.assert_close(total, a + b, atol=1e-6, rtol=1e-4)


def test_the_constant_is_one_and_learns_for_both():
    critic = TwinCritic(SPACES, SMALL, context=["constant"])
    found = values(critic, torch.randn(6, 5), torch.randn(6, 3))
    total, one, other = (
        torch.autograd.grad(value.sum(), critic.constant, retain_graph=True)[0] for value in (sum(found), *found)
    )
    assert one.all()
    assert other.all()
    torch.testing.assert_close(total, one + other)
    assert critic.constant.shape == (5,)


@pytest.mark.parametrize("context", [["state"], ["action"], ["constant"], ["task", "action"]])
@pytest.mark.parametrize("network", [SMALL, partial(Concat, hidden=[8])])
def test_leading_dimensions_may_be_any(context, network):
    critic = TwinCritic(SPACES, network, context=context, task_features=2)
    given = torch.randn(4, 7, 5), torch.randn(4, 7, 3), torch.randn(4, 7, 2)
    flat = values(critic, *(entry.flatten(0, 1) for entry in given))
    for value, other in zip(values(critic, *given), flat, strict=True):
        assert value.shape == (4, 7)
        torch.testing.assert_close(value.flatten(), other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("context", "columns"),
    [(["action"], [0, 1, 2, 3, 4, 5, 6, 7]), (["state"], [5, 6, 7, 0, 1, 2, 3, 4]), ([], [0, 1, 2, 3, 4, 5, 6, 7])],
)
@torch.no_grad()
def test_d2rl_shows_state_and_action_to_every_hidden_layer(context, columns):
    critic = TwinCritic(SPACES, partial(D2RL, hidden=[8, 9, 7], activation="relu"), context=context)
    state, action = torch.randn(6, 5), torch.randn(6, 3)
    for net, value in zip((critic.first, critic.second), values(critic, state, action), strict=True):
        one, two, three, out = linears(net)
        both = torch.cat([state, action], 1)[:, columns]
        h = affine(one, both).clamp(min=0)
        h = affine(two, torch.cat([h, both], 1)).clamp(min=0)
        h = affine(three, torch.cat([h, both], 1)).clamp(min=0)
        torch.testing.assert_close(value, affine(out, h)[:, 0], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_residual_features_go_into_a_plain_network_beside_the_action():
    trunk = partial(ResidualTrunk, widths=(6, 7), features=10)
    critic = TwinCritic(SPACES, partial(Concat, hidden=[8, 9], activation="relu", trunk=trunk))
    state, action = torch.randn(6, 5), torch.randn(6, 3)
    for net, value in zip((critic.first, critic.second), values(critic, state, action), strict=True):
        z = residual(net.trunk, state, stages=2)
        assert z.shape == (6, 10)
        one, two, out = (layer for layer in linears(net) if not any(layer is t for t in linears(net.trunk)))
        h = affine(two, affine(one, torch.cat([action, z], 1)).clamp(min=0)).clamp(min=0)
        torch.testing.assert_close(value, affine(out, h)[:, 0], atol=1e-6, rtol=1e-5)


def test_values_are_float32_under_autocast():
    critic = TwinCritic(SPACES, SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        found = (*values(critic, torch.randn(6, 5), torch.randn(6, 3)),)
        found = (*found, critic.value({"observation": torch.randn(6, 5)}, torch.randn(6, 3)))
    assert {value.dtype for value in found} == {torch.float32}


def test_frozen_lets_gradients_through_and_gives_parameters_back_as_they_were():
    critic = TwinCritic(SPACES, SMALL)
    held = critic.second.layers[0].weight.bias.requires_grad_(False)
    action = torch.randn(6, 3, requires_grad=True)
    with frozen(critic):
        assert not any(p.requires_grad for p in critic.parameters())
        sum(values(critic, torch.randn(6, 5), action)).sum().backward()
    assert action.grad.any()
    assert all(p.grad is None for p in critic.parameters())
    assert [id(p) for p in critic.parameters() if not p.requires_grad] == [id(held)]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"context": ["SA"]}, r"context is \['SA'\]; it must be a list, each one of state, action, constant, task"),
        ({"context": ["state", "state"]}, "name each part once"),
        ({"context": ["task"]}, "model.critic_context names task, but there is no model.context"),
        ({"context": ["state", "action"]}, "leaves no input"),
        ({"context": ["state", "action", "task"], "task_features": 2}, "leaves no input"),
        ({"network": MLP}, "model.critic: MLP as it is set ignores its context, which .* says is state"),
        ({"network": ContextOnly}, "model.critic: ContextOnly ignores its input, action"),
        ({"shared_trunk": True, "network": partial(Hyper, hidden=[8])}, "model.shared_trunk: Hyper .* has no trunk"),
        ({"shared_trunk": True, "network": Bilinear}, "model.shared_trunk: Bilinear .* has no trunk"),
    ],
)
def test_impossible_options_name_the_key(options, key):
    with pytest.raises(ValueError, match=key):
        TwinCritic(SPACES, **{"network": SMALL, **options})


@torch.no_grad()
def test_a_users_own_module_serves():
    critic = TwinCritic(SPACES, Bilinear)
    state, action = torch.randn(6, 5), torch.randn(6, 3)
    expected = torch.einsum("ba,ac,bc->b", action, critic.second.weight, state)
    torch.testing.assert_close(values(critic, state, action)[1], expected)
