"""Conditional networks f(x | c) equal plain networks with the weights that c stands for."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from lightning_hyper.checks import RecipeError
from lightning_hyper.nn import D2RL, MLP, Concat, ContextOnly, FiLM, Hyper, MLPTrunk, ResidualTrunk, grouped

CLASSES = [MLP, ContextOnly, Concat, D2RL, FiLM, Hyper]
SEEING = [ContextOnly, Concat, D2RL, FiLM, Hyper]


def shaken(net):
    """The network with all parameters drawn anew, so that nothing about it is zero."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    return net


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


def test_a_products_gradient_equals_that_of_a_loop_over_rows():
    net = Hyper(3, 5, 2, hidden=[], contraction="materialise", init="sarafian")
    x, c = torch.randn(7, 3, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    head, weights = net.layers[0], torch.randn(7, 2)
    looped = torch.stack([head.weight(c[k]).view(2, 3) @ x[k] + head.bias(c[k]) for k in range(7)])
    wanted = [x, c, *net.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad((net(x, c) * weights).sum(), wanted),
        torch.autograd.grad((looped * weights).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cls", SEEING)
def test_a_shared_context_equals_repeating_it(cls):
    net = shaken(cls(3, 5, 2, hidden=[4], trunk=partial(MLPTrunk, widths=(6,))))
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


def test_film_scales_and_shifts_every_layer_by_the_context():
    net = shaken(FiLM(3, 5, 2, hidden=[4]))
    x, c = torch.randn(7, 3), torch.randn(7, 5)
    y = x
    for layer, film, after in zip(net.layers, net.film, (torch.tanh, lambda u: u), strict=True):
        scale, shift = (c @ film.weight.T + film.bias).chunk(2, -1)
        y = after((1 + scale) * (y @ layer.weight.T) + shift)
    torch.testing.assert_close(net(x, c), y)


def test_film_begins_as_the_plain_network_whose_initialisation_it_has():
    torch.manual_seed(1)
    plain = MLP(3, 0, 2, hidden=[4])
    torch.manual_seed(1)
    net = FiLM(3, 5, 2, hidden=[4])
    x = torch.randn(7, 3)
    torch.testing.assert_close(net(x, torch.randn(7, 5)), plain(x, torch.empty(7, 0)))


def test_film_leaves_the_output_layer_alone_where_it_is_told_to():
    net = shaken(FiLM(3, 5, 2, hidden=[4], film_output=False))
    assert len(net.film) == 1
    x, c = torch.randn(7, 3), torch.randn(7, 5)
    scale, shift = net.film[0](c).chunk(2, -1)
    inside = torch.tanh((1 + scale) * (x @ net.layers[0].weight.T) + shift)
    torch.testing.assert_close(net(x, c), inside @ net.layers[1].weight.T + net.layers[1].bias)


def test_d2rl_shows_every_hidden_layer_the_inputs_again():
    net = D2RL(3, 5, 2, hidden=[4, 6])
    x, c = torch.randn(7, 3), torch.randn(7, 5)
    both = torch.cat([x, c], 1)
    y = torch.tanh(F.linear(both, net.layers[0].weight, net.layers[0].bias))
    y = torch.tanh(F.linear(torch.cat([y, both], 1), net.layers[1].weight, net.layers[1].bias))
    torch.testing.assert_close(net(x, c), F.linear(y, net.layers[2].weight, net.layers[2].bias))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_network_says_what_its_output_depends_on(cls):
    net = shaken(cls(3, 5, 2))
    x, c = torch.randn(7, 3), torch.randn(7, 5)
    assert net.uses_input is not torch.equal(net(x, c), net(x + 1, c))
    assert net.uses_context is not torch.equal(net(x, c), net(x, c + 1))


def test_a_network_of_which_nothing_is_conditioned_says_so():
    assert not FiLM(3, 5, 2, hidden=[], film_output=False).uses_context
    assert FiLM(3, 5, 2, hidden=[4], film_output=False).uses_context
    assert not Hyper(3, 5, 2, hidden=[4], generated=[False, False]).uses_context


@pytest.mark.parametrize("cls", [MLP, Concat, D2RL])
def test_without_a_context_plain_networks_are_networks_of_x(cls):
    net = cls(3, 0, 2, hidden=[4])
    assert not net.uses_context
    x = torch.randn(7, 3)
    expected = net.layers[1](torch.tanh(net.layers[0](x)))
    torch.testing.assert_close(net(x, torch.empty(7, 0)), expected)
    torch.testing.assert_close(net(x, torch.empty(0)), expected)


@pytest.mark.parametrize("cls", [ContextOnly, FiLM, Hyper])
def test_a_network_that_needs_a_context_says_so(cls):
    with pytest.raises(RecipeError, match=rf"^{cls.__name__} .+ a context, and there is none: name model.context, or"):
        cls(3, 0, 2)


@pytest.mark.parametrize("make", [partial(MLP, 3, 5), partial(Concat, 3, 0), partial(Hyper, 3, 5, generated=[False])])
def test_a_trunk_that_nothing_reads_is_refused(make):
    with pytest.raises(ValueError, match=r"this .+ uses none: leave trunk out"):
        make(2, hidden=[], trunk=partial(MLPTrunk, widths=(6,)))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("trunk", [None, partial(MLPTrunk, widths=(6,))])
def test_grouped_rows_equal_each_row_with_its_own_context(cls, trunk):
    if cls is MLP and trunk is not None:
        return
    net = shaken(cls(3, 5, 2, hidden=[4], trunk=trunk))
    x, contexts, index = torch.randn(50, 3, requires_grad=True), torch.randn(6, 5), torch.randint(5, (50,))
    together, apart = grouped(net, x, contexts, index), net(x, contexts[index])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)
    weights = torch.randn(50, 2)
    if net.uses_input:
        mine, theirs = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (together, apart))
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_grouped_rows_take_a_trunk_once_for_each_context():
    net, rows = Concat(3, 5, 2, trunk=partial(MLPTrunk, widths=(6,))), []
    net.trunk.register_forward_hook(lambda _, inputs, out: rows.append(len(out)))
    grouped(net, torch.randn(50, 3), torch.randn(6, 5), torch.randint(6, (50,)))
    assert rows == [6]


def test_grouped_rows_make_weights_once_for_each_context():
    net, rows = Hyper(3, 5, 2), []
    net.layers[0].weight.register_forward_hook(lambda _, inputs, out: rows.append(len(out)))
    grouped(net, torch.randn(50, 3), torch.randn(6, 5), torch.randint(6, (50,)))
    assert rows == [6]


class Gated(Concat):
    """A user's own: Concat whose output is scaled by a gate computed from the context."""

    def __init__(self, *sizes: int, sharpness: float = 1.0, **options: object):
        self.sharpness = sharpness
        super().__init__(*sizes, **options)

    def _build(self):
        super()._build()
        self.gate = nn.Linear(self.z_features, self.out_features)

    def conditioned(self, x, z):
        return super().conditioned(x, z) * torch.sigmoid(self.sharpness * self.gate(z))


def test_a_users_subclass_adds_layers_and_options():
    net = Gated(3, 5, 2, sharpness=2.0, hidden=[4], trunk=partial(MLPTrunk, widths=(6,)))
    x, c = torch.randn(7, 3), torch.randn(7, 5)
    y = net.layers[1](torch.tanh(net.layers[0](torch.cat([x, net.trunk(c)], 1))))
    torch.testing.assert_close(net(x, c), y * torch.sigmoid(2 * net.gate(net.trunk(c))))


class Agent:
    def __init__(self, actor: Callable[[int, int, int], nn.Module]):
        self.actor = actor(3, 5, 2)


@pytest.mark.parametrize(
    ("cls", "own"),
    [(Concat, {}), (FiLM, {"film_output": False}), (Hyper, {"gain": True, "init": "sarafian", "contraction": "outer"})],
)
def test_a_recipe_names_every_option_of_a_network(cls, own):
    common = {"hidden": [4], "activation": "relu", "hidden_init": "normc", "hidden_gain": 2.0, "out_gain": 3.0}
    trunk = {"class_path": "lightning_hyper.nn.MLPTrunk", "init_args": {"widths": [6]}}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Agent, "agent")
    actor = {"class_path": f"lightning_hyper.nn.{cls.__name__}", "init_args": {**common, **own, "trunk": trunk}}
    net = parser.instantiate(parser.parse_object({"agent": {"actor": actor}})).agent.actor
    assert type(net) is cls
    assert (net.hidden, net.hidden_gain, net.out_gain, net.z_features) == ((4,), 2.0, 3.0, 6)
    for key, value in own.items():
        assert getattr(net, key) == value


@pytest.mark.parametrize("cls", CLASSES)
def test_works_under_vmap_compile_and_bf16(cls):
    net = cls(3, 5, 2, hidden=[4])
    x, c = torch.randn(7, 3), torch.randn(7, 5)
    expected = net(x, c)
    torch.testing.assert_close(vmap(net)(x, c), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.compile(net)(x, c), expected, atol=1e-6, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net(x, c).float(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("contraction", ["materialise", "outer", "inner"])
def test_double_backward_works(contraction):
    net = Hyper(2, 3, 1, hidden=[4], init="sarafian", contraction=contraction).double()
    x, c = (
        torch.randn(3, 2, dtype=torch.double, requires_grad=True),
        torch.randn(3, 3, dtype=torch.double, requires_grad=True),
    )
    assert torch.autograd.gradgradcheck(net, (x, c))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"generated": [True]}, "generated"),
        ({"init": "magic"}, "init is 'magic'"),
        ({"contraction": "x"}, "contraction"),
        ({"quirks": ["x"]}, r"quirks is \['x'\]; it must be a list, each one of kaiming"),
        ({"quirks": ["critic_bias_fan_in"], "init": "kaiming"}, "quirks are those of"),
        ({"quirks": ["critic_bias_fan_in"], "generated": [True, False]}, "quirks are those of"),
        ({"hidden": [0]}, "hidden"),
        ({"activation": "swish"}, "activation"),
        ({"out_init": "x"}, "out_init is 'x'"),
        ({"hidden_init": "x"}, "hidden_init is 'x'"),
    ],
)
def test_bad_options_name_the_key(options, key):
    with pytest.raises(RecipeError, match=key):
        Hyper(3, 5, 2, **options)


def test_a_shared_trunk_learns_for_both():
    one, other = (Concat(3, 5, 2, trunk=partial(MLPTrunk, widths=(6,))) for _ in range(2))
    other.share_trunk(one)
    assert other.trunk is one.trunk
    with pytest.raises(ValueError, match="Concat has none"):
        Concat(3, 5, 2).share_trunk(one)


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
