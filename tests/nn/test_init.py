"""Each initialisation scheme gives the distribution that it promises."""

import math

import pytest
import torch

from lightning_hyper.nn import MLP, Concat, Hyper, MLPTrunk
from lightning_hyper.nn.init import BASE, base_scheme


def drawn(name, out=200, inputs=300, gain=1.0):
    weight, bias = torch.empty(out, inputs), torch.empty(out)
    with torch.no_grad():
        base_scheme(name)(weight, bias, gain)
    return weight, bias


def test_normc_rows_have_the_norm_of_the_gain():
    weight, bias = drawn("normc", gain=5 / 3)
    torch.testing.assert_close(weight.norm(dim=1), torch.full((200,), 5 / 3))
    assert not bias.any()


def test_orthogonal_rows_are_orthogonal():
    weight, bias = drawn("orthogonal", gain=0.5)
    torch.testing.assert_close(weight @ weight.T, 0.25 * torch.eye(200), atol=1e-5, rtol=0)
    assert not bias.any()


def test_kaiming_keeps_the_second_moment_through_a_relu():
    weight, _ = drawn("kaiming", gain=2**0.5)
    assert weight.var().item() == pytest.approx(2 / 300, rel=0.02)
    x = torch.randn(1000, 300).relu()
    assert (x @ weight.T).square().mean().item() == pytest.approx(1, rel=0.15)


def test_default_is_that_of_pytorchs_linear():
    weight, bias = drawn("default")
    reference = torch.nn.Linear(300, 200)
    for mine, theirs in ((weight, reference.weight), (bias, reference.bias)):
        assert mine.var().item() == pytest.approx(1 / 900, rel=0.15)
        assert theirs.var().item() == pytest.approx(mine.var().item(), rel=0.25)
        assert mine.abs().max() <= 1 / math.sqrt(300)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_kaiming_is_pytorchs(activation):
    weight = MLP(300, 0, 2, hidden=[200], hidden_init="kaiming", activation=activation).layers[0].weight
    reference = torch.empty(200, 300)
    torch.nn.init.kaiming_uniform_(reference, nonlinearity=activation)
    assert weight.abs().max().item() == pytest.approx(reference.abs().max().item(), rel=0.01)
    assert weight.var().item() == pytest.approx(reference.var().item(), rel=0.02)


def test_xavier_is_pytorchs():
    weight, bias = drawn("xavier")
    assert weight.var().item() == pytest.approx(2 / 500, rel=0.02)
    assert not bias.any()


def test_networks_begin_as_pytorchs_linear_layers_unless_told_otherwise():
    for net in (Concat(290, 10, 2, hidden=[200]), Hyper(300, 10, 2, hidden=[200])):
        weight = net.layers[0].weight.bias if isinstance(net, Hyper) else net.layers[0].weight
        assert weight.var().item() == pytest.approx(1 / 900, rel=0.05)
        assert weight.abs().max() <= 1 / math.sqrt(300)


def test_hidden_layers_have_the_gain_of_their_activation_or_their_own():
    for options, gain in (
        ({"activation": "tanh"}, 5 / 3),
        ({"activation": "relu"}, 2**0.5),
        ({"activation": "identity"}, 1.0),
        ({"hidden_gain": 0.5}, 0.5),
    ):
        net = Concat(3, 5, 4, hidden=[64], hidden_init="normc", out_init="normc", out_gain=0.1, **options)
        for layer, norm in zip(net.layers, (gain, 0.1), strict=True):
            torch.testing.assert_close(layer.weight.norm(dim=1), torch.full((len(layer.weight),), norm))
        bounded = Concat(3, 5, 4, hidden=[64], **options).layers[0].weight.abs().max()
        assert 0.9 < bounded * 8**0.5 / options.get("hidden_gain", 1.0) <= 1


def test_dense_bodies_have_the_gain_of_their_activation_or_their_own():
    for options, gain in (({}, 5 / 3), ({"activation": "relu"}, 2**0.5), ({"gain": 0.5}, 0.5)):
        rows = MLPTrunk(3, widths=(64,), init="normc", **options).layers[0].weight.norm(dim=1)
        torch.testing.assert_close(rows, torch.full_like(rows, gain))


def generated(init, z, **options):
    net = Hyper(64, z.shape[-1], 32, hidden=[128], init=init, **{"hidden_init": "normc", **options})
    return net, net.generate(z)


def test_bias_hyperinit_generates_the_base_initialisation():
    _, ((weight, bias, _), (out, out_bias, _)) = generated(
        "bias_hyperinit", torch.randn(3, 10), out_init="orthogonal", out_gain=0.01
    )
    torch.testing.assert_close(weight.norm(dim=-1), torch.full((3, 128), 5 / 3))
    torch.testing.assert_close(out[0] @ out[0].T, 1e-4 * torch.eye(32), atol=1e-7, rtol=0)
    assert not bias.any()
    assert not out_bias.any()


def test_weight_hyperinit_gives_each_one_hot_context_a_base_initialisation_of_its_own():
    _, ((weight, _, _), _) = generated("weight_hyperinit", torch.eye(5))
    torch.testing.assert_close(weight.norm(dim=-1), torch.full((5, 128), 5 / 3))
    cosine = torch.nn.functional.cosine_similarity(weight[0].flatten(), weight[1].flatten(), dim=0)
    assert cosine.abs() < 0.05


def test_both_hyperinit_is_half_shared_and_half_of_each_context():
    _, ((weight, _, _), _) = generated("both_hyperinit", torch.eye(5))
    # two independent halves of squared norm (5/3)^2 / 4 each
    assert weight.square().sum(-1).mean().item() == pytest.approx((5 / 3) ** 2 / 2, rel=0.05)
    cosine = torch.nn.functional.cosine_similarity(weight[0].flatten(), weight[1].flatten(), dim=0)
    assert cosine.item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("options", "variance"),
    [
        ({"activation": "relu"}, 2.0),
        ({"activation": "tanh"}, 25 / 9),
        ({"activation": "tanh", "hidden_gain": 1.0}, 1.0),
    ],
)
def test_hyperfan_in_shares_the_promised_variance_between_weight_and_bias(options, variance):
    z, x = torch.randn(2000, 50), torch.randn(2000, 64)
    net, ((weight, bias, _), (out, out_bias, _)) = generated("hyperfan_in", z, out_gain=0.01, **options)
    assert weight.var().item() == pytest.approx(variance / (2 * 64), rel=0.05)
    assert bias.var().item() == pytest.approx(variance / 2, rel=0.2)
    assert net.layers[0](z, x).var().item() == pytest.approx(variance, rel=0.1)
    assert out.var().item() == pytest.approx(1e-4 / (2 * 128), rel=0.05)
    assert out_bias.var().item() == pytest.approx(1e-4 / 2, rel=0.3)


def test_hyperfan_in_has_the_published_scale():
    # standard deviations of the recurrent paper's code at its size: z of 25, layers 25-256-128-5, the actor's gain 0.01
    net = Hyper(25, 25, 5, hidden=[256, 128], init="hyperfan_in", out_gain=0.01)
    first, last = net.layers[0], net.layers[2]
    assert first.weight.weight.std().item() == pytest.approx(0.0471, rel=0.02)
    assert first.bias.weight.std().item() == pytest.approx(0.236, rel=0.05)
    assert last.weight.weight.std().item() == pytest.approx(0.000125, rel=0.03)
    assert last.bias.weight.std().item() == pytest.approx(0.00141, rel=0.2)


@pytest.mark.parametrize(("init", "std"), [("kaiming", 1 / 3), ("normc", 1 / 3), ("orthogonal", 5 / 3 / 6400**0.5)])
def test_plain_heads_have_the_published_scale(init, std):
    net = Hyper(25, 25, 5, hidden=[256, 128], init=init, out_gain=5 / 3)
    assert net.layers[0].weight.weight.std().item() == pytest.approx(std, rel=0.02)
    assert net.layers[2].weight.weight.norm(dim=1).mean().item() == pytest.approx(
        {"kaiming": 5 / 3, "normc": 5 / 3, "orthogonal": 5 / 3 * (25 / 640) ** 0.5}[init], rel=0.05
    )


@pytest.mark.parametrize("init", ["bias_hyperinit", "weight_hyperinit", "both_hyperinit"])
def test_quirks_of_the_published_critic_are_there_by_name(init):
    z = torch.eye(5)
    sound, quirky = (
        Hyper(3, 5, 1, hidden=[128], init=init, quirks=quirks).generate(z)[1]
        for quirks in ([], ["kaiming_critic_head", "critic_bias_fan_in"])
    )
    shares = 2**-0.5 if init == "both_hyperinit" else 1.0  # of two independent halves
    assert sound[0].std().item() == pytest.approx(shares * (1 / (3 * 128)) ** 0.5, rel=0.25)
    assert quirky[0].std().item() == pytest.approx(shares * (2 / 128) ** 0.5, rel=0.25)
    starts = torch.stack(
        [Hyper(3, 5, 1, hidden=[4], init=init, quirks=["critic_bias_fan_in"]).generate(z)[1][1] for _ in range(300)]
    )
    assert torch.equal(starts, starts[:, :1].expand_as(starts))
    assert starts.var().item() == pytest.approx(1 / 3, abs=0.06)
    assert 0.9 < starts.abs().max() <= 1


def test_sarafian_bounds_are_the_published_ones_at_the_papers_size():
    net = Hyper(6, 1024, 1, hidden=[256], gain=True, init="sarafian")
    for layer, bound in zip(net.layers, (0.05, 0.008), strict=True):
        for head in (layer.weight, layer.bias, layer.gain):
            assert 0.9 * bound < head.weight.abs().max() <= bound
            assert not head.bias.any()


def test_sarafian_keeps_the_scale_of_generated_weights_at_other_widths():
    scales = []
    for z, hidden in ((1024, 256), (64, 256)):
        (first, _, _), (last, _, _) = Hyper(6, z, 1, hidden=[hidden], init="sarafian").generate(torch.randn(200, z))
        scales.append((first.std().item(), last.std().item()))
    assert scales[1] == pytest.approx(scales[0], rel=0.1)


@pytest.mark.parametrize("name", sorted(BASE))
def test_plain_schemes_fill_the_heads_as_any_linear_layer(name):
    net = Hyper(64, 300, 32, hidden=[128], init=name, hidden_gain=1.0)
    variance = {
        "default": 1 / 900,
        "normc": 1 / 300,
        "orthogonal": 1 / (128 * 64),
        "kaiming": 1 / 300,
        "xavier": 2 / 8492,
    }[name]
    assert net.layers[0].weight.weight.var().item() == pytest.approx(variance, rel=0.05)


def test_generated_gains_begin_at_one():
    ((_, _, gain), _) = Hyper(3, 5, 2, hidden=[4], gain=True, init="hyperfan_in").generate(torch.randn(7, 5))
    assert not gain.any()
