"""Conditional networks f(x | c) equal plain networks with the weights that c stands for."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from lightning_hyper.nn import Concat, ContextOnly, FiLM, Hyper, MLPTrunk, ResidualTrunk

CLASSES = [Concat, ContextOnly, FiLM, Hyper]


def plain(weights, gains, activation):
    """A function (x) of the generated weights of one context, written out."""

    def run(x):
        for k, (weight, bias, gain) in enumerate(weights):
            x = weight @ x
            if gains:
                x = x * (1 + gain)
            x = x + bias
            if k < len(weights) - 1:
                x = activation(x)
        return x

    return run


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("contraction", ["auto", "materialise", "outer", "inner"])
@pytest.mark.parametrize("trunk", [None, partial(MLPTrunk, widths=(4,))])
def test_hyper_equals_a_per_sample_loop(gain, contraction, trunk):
    net = Hyper(3, 5, 2, hidden=[4, 6], gain=gain, contraction=contraction, trunk=trunk, init="sarafian")
    x, c = torch.randn(7, 3), torch.randn(7, 5)
    expected = []
    for row in range(7):
        weights = [tuple(None if t is None else t[0] for t in layer) for layer in net.generate(c[row : row + 1])]
        expected.append(plain(weights, gain, torch.tanh)(x[row]))
    torch.testing.assert_close(net(x, c), torch.stack(expected), atol=1e-6, rtol=1e-5)


def test_hyper_equals_functional_call_on_a_plain_network_with_its_weights():
    net = Hyper(3, 5, 2, hidden=[4], init="hyperfan_in", activation="relu")
    twin = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x, c = torch.randn(7, 3), torch.randn(7, 5)
    (w1, b1, _), (w2, b2, _) = net.generate(c)
    weights = {"0.weight": w1, "0.bias": b1, "2.weight": w2, "2.bias": b2}
    expected = vmap(lambda w, row: functional_call(twin, w, (row,)))(weights, x)
    torch.testing.assert_close(net(x, c), expected, atol=1e-6, rtol=1e-5)


def test_contractions_have_the_same_gradients():
    x, c = torch.randn(7, 3), torch.randn(7, 5)
    grads = {}
    for name in ("materialise", "outer", "inner"):
        torch.manual_seed(1)
        net = Hyper(3, 5, 2, hidden=[4], gain=True, contraction=name, init="sarafian")
        a, b = x.clone().requires_grad_(), c.clone().requires_grad_()
        grads[name] = torch.autograd.grad(net(a, b).square().sum(), [a, b, *net.parameters()])
    for name in ("outer", "inner"):
        for one, other in zip(grads["materialise"], grads[name], strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_shared_context_equals_repeating_it(cls):
    net = cls(3, 5, 2, hidden=[4], trunk=partial(MLPTrunk, widths=(6,)))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    x, c = torch.randn(2, 3, 8, 3), torch.randn(2, 5)
    repeated = net(x, c[:, None, None].expand(2, 3, 8, 5))
    torch.testing.assert_close(net(x, c), repeated, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(net(x, c[:, None].expand(2, 3, 5)), repeated, atol=1e-5, rtol=1e-4)
    assert net(x, c).shape == (2, 3, 8, 2)


def test_weights_are_made_once_per_context_and_not_per_input():
    net = Hyper(3, 5, 2, hidden=[4])
    rows = []
    net.layers[0].weight.register_forward_hook(lambda _, inputs, out: rows.append(out.numel() // out.shape[-1]))
    net(torch.randn(2, 100, 3), torch.randn(2, 5))
    assert rows == [2]


def test_layers_that_are_not_generated_have_weights_of_their_own():
    net = Hyper(3, 5, 2, hidden=[4, 6], generated=[False, True, False])
    assert [isinstance(layer, nn.Linear) for layer in net.layers] == [True, False, True]
    x, c = torch.randn(7, 3), torch.randn(7, 5)
    ((w, b, _),) = net.generate(c)
    h = torch.tanh(net.layers[0](x))
    h = torch.tanh(torch.einsum("noi,ni->no", w, h) + b)
    torch.testing.assert_close(net(x, c), net.layers[2](h))


@pytest.mark.parametrize("init", ["bias_hyperinit"])
def test_bias_hyperinit_makes_the_first_function_independent_of_the_context(init):
    net = Hyper(3, 5, 2, hidden=[16], init=init)
    x = torch.randn(7, 3)
    torch.testing.assert_close(net(x, torch.randn(7, 5)), net(x, 10 * torch.randn(7, 5)), atol=0, rtol=0)
    assert net(x, torch.randn(7, 5)).std() > 0


def test_film_begins_as_a_plain_network_of_x_and_scales_and_shifts_by_c():
    net = FiLM(3, 5, 2, hidden=[4])
    x, c = torch.randn(7, 3), torch.randn(7, 5)
    own = net.layers[1](torch.tanh(net.layers[0](x)))
    torch.testing.assert_close(net(x, c), own)
    with torch.no_grad():
        net.film[0].bias[:4] = 0.5
        net.film[0].bias[4:] = -1.0
    torch.testing.assert_close(net(x, c), net.layers[1](torch.tanh(1.5 * net.layers[0](x) - 1.0)))


def test_context_only_is_blind_to_x_and_concat_is_not():
    x, y, c = torch.randn(7, 3), torch.randn(7, 3), torch.randn(7, 5)
    blind, seeing = ContextOnly(3, 5, 2), Concat(3, 5, 2)
    assert torch.equal(blind(x, c), blind(y, c))
    assert not torch.allclose(blind(x, c), blind(x, c + 1))
    assert not torch.allclose(seeing(x, c), seeing(y, c))


def test_hidden_layers_have_the_gain_of_their_activation():
    for activation, gain in (("tanh", 5 / 3), ("relu", 2**0.5)):
        rows = Concat(3, 5, 2, hidden=[64], activation=activation).layers[0].weight.norm(dim=1)
        torch.testing.assert_close(rows, torch.full_like(rows, gain))


@pytest.mark.parametrize("cls", CLASSES)
def test_works_under_vmap_compile_and_bf16(cls):
    net = cls(3, 5, 2, hidden=[4])
    x, c = torch.randn(7, 3), torch.randn(7, 5)
    torch.testing.assert_close(vmap(net)(x, c), net(x, c), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.compile(net)(x, c), net(x, c), atol=1e-6, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net(x, c).float(), net(x, c).float())


def test_double_backward_works():
    net = Hyper(2, 3, 1, hidden=[4], init="sarafian").double()
    x, c = (
        torch.randn(3, 2, dtype=torch.double, requires_grad=True),
        torch.randn(3, 3, dtype=torch.double, requires_grad=True),
    )
    assert torch.autograd.gradgradcheck(net, (x, c))


def test_quirks_of_the_published_code_are_there_by_name():
    sound = Hyper(3, 5, 1, hidden=[128])
    quirky = Hyper(3, 5, 1, hidden=[128], quirks=["kaiming_critic_head", "critic_bias_fan_in"])
    bound = 1 / 128**0.5
    assert sound.layers[1].weight.bias.abs().max() <= bound
    assert bound < quirky.layers[1].weight.bias.abs().max() <= (6 / 128) ** 0.5
    biases = torch.stack(
        [Hyper(3, 5, 1, hidden=[4], quirks=["critic_bias_fan_in"]).layers[1].bias.bias for _ in range(200)]
    )
    assert biases.var().item() == pytest.approx(1 / 3, abs=0.08)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"generated": [True]}, "generated"),
        ({"init": "magic"}, "init is 'magic'"),
        ({"contraction": "x"}, "contraction"),
        ({"quirks": ["x"]}, "quirks"),
        ({"hidden": [0]}, "hidden"),
        ({"activation": "swish"}, "activation"),
        ({"out_init": "x"}, "'x' is unknown"),
    ],
)
def test_bad_options_name_the_key(options, key):
    with pytest.raises(ValueError, match=key):
        Hyper(3, 5, 2, **options)


def test_a_context_that_does_not_go_with_x_is_refused():
    with pytest.raises(ValueError, match="does not go with x"):
        Concat(3, 5, 2)(torch.randn(7, 3), torch.randn(6, 5))


def test_residual_trunk_equals_its_formula():
    trunk = ResidualTrunk(3, widths=(4, 6), blocks=1)
    stages = trunk.stages
    z = x = torch.randn(5, 3)
    for linear, block in ((stages[0], stages[1]), (stages[2], stages[3])):
        z = linear(z)
        z = z + block.second(torch.relu(block.first(torch.relu(z))))
    torch.testing.assert_close(trunk(x), z)
    assert trunk.out_features == 6


@pytest.mark.parametrize(("scale", "factor"), [("td3", 4), ("sac", 2)])
def test_residual_trunk_has_the_published_scale(scale, factor):
    weight = ResidualTrunk(400, widths=(300,), blocks=0, scale=scale).stages[0].weight
    bound = 1 / (factor * 400) ** 0.5
    assert 0.99 * bound < weight.abs().max() <= bound
    assert weight.var().item() == pytest.approx(bound**2 / 3, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("contraction", ["materialise", "outer", "inner"])
def test_gpu_equals_cpu(contraction):
    net = Hyper(3, 5, 2, hidden=[16], contraction=contraction, init="sarafian")
    x, c = torch.randn(70, 3), torch.randn(70, 5)
    expected = net(x, c)
    torch.testing.assert_close(net.cuda()(x.cuda(), c.cuda()).cpu(), expected, atol=1e-4, rtol=1e-3)
