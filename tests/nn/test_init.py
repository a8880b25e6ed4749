"""Each initialisation scheme gives the distribution that it promises."""

import math

import pytest
import torch

from lightning_hyper.nn import Hyper
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
    weight, _ = drawn("kaiming")
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


def generated(init, z, **options):
    net = Hyper(64, z.shape[-1], 32, hidden=[128], init=init, **options)
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


@pytest.mark.parametrize(("activation", "factor"), [("relu", 2.0), ("tanh", 1.0)])
def test_hyperfan_in_shares_the_promised_variance_between_weight_and_bias(activation, factor):
    z, x = torch.randn(2000, 50), torch.randn(2000, 64)
    net, ((weight, bias, _), _) = generated("hyperfan_in", z, activation=activation)
    assert weight.var().item() == pytest.approx(factor / (2 * 64), rel=0.05)
    assert bias.var().item() == pytest.approx(factor / 2, rel=0.2)
    assert net.layers[0](z, x).var().item() == pytest.approx(factor, rel=0.1)


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
    torch.manual_seed(3)
    net = Hyper(64, 300, 32, hidden=[128], init=name)
    variance = {
        "default": 1 / 900,
        "normc": 1 / 300,
        "orthogonal": 1 / (128 * 64),
        "kaiming": 2 / 300,
        "xavier": 2 / 8492,
    }[name]
    assert net.layers[0].weight.weight.var().item() == pytest.approx(variance, rel=0.05)
