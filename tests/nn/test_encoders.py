"""Encoders of vectors, grids and images equal PyTorch's layers called by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_hyper.checks import RecipeError
from lightning_hyper.nn import ConvEncoder, GridEncoder, VectorEncoder


def of_kind(encoder, kind):
    return [layer for layer in encoder.modules() if isinstance(layer, kind)]


def test_a_vector_goes_through_each_layer_and_its_activation():
    encoder = VectorEncoder((3,), widths=[4, 6], activation="relu")
    x = torch.randn(5, 3)
    first, second = of_kind(encoder, nn.Linear)
    torch.testing.assert_close(encoder(x), F.relu(F.linear(F.relu(first(x)), second.weight, second.bias)))
    assert encoder.out_features == 6


def test_a_vectors_shape_may_be_a_number_and_no_layer_leaves_it_as_it_is():
    x = torch.randn(5, 3)
    assert VectorEncoder(3)(x).shape == (5, 32)
    plain = VectorEncoder((3,), widths=[])
    assert torch.equal(plain(x), x)
    assert plain.out_features == 3


def test_a_grid_goes_through_three_convolutions_as_numbers():
    encoder = GridEncoder((7, 9, 3), channels=(4, 5, 6))
    grid = torch.randint(11, (2, 7, 9, 3), dtype=torch.uint8)
    first, second, third = of_kind(encoder, nn.Conv2d)
    y = F.max_pool2d(F.relu(F.conv2d(grid.permute(0, 3, 1, 2).float(), first.weight, first.bias)), 2)
    y = F.relu(F.conv2d(y, second.weight, second.bias))
    y = F.relu(F.conv2d(y, third.weight, third.bias)).flatten(1)
    torch.testing.assert_close(encoder(grid), y)
    assert encoder.out_features == y.shape[1] == 12


def nature(encoder, image):
    """The layers of Mnih et al. 2015 on images `[B, channels, height, width]` in [0, 1]."""
    y = image
    for layer, stride in zip(of_kind(encoder, nn.Conv2d), (4, 2, 1), strict=True):
        y = F.relu(F.conv2d(y, layer.weight, layer.bias, stride=stride))
    (dense,) = of_kind(encoder, nn.Linear)
    return F.relu(F.linear(y.flatten(1), dense.weight, dense.bias))


@pytest.mark.parametrize("shape", [(4, 84, 84), (84, 84, 4), (3, 60, 84), (60, 84, 3), (36, 36, 1), (2, 36, 40)])
def test_an_image_goes_through_the_nature_network_whichever_way_it_lies(shape):
    encoder = ConvEncoder(shape, features=16)
    image = torch.randint(256, (2, *shape), dtype=torch.uint8)
    channels_first = image if shape[-1] > 4 else image.permute(0, 3, 1, 2)
    torch.testing.assert_close(encoder(image), nature(encoder, channels_first / 255.0))
    assert encoder(image).std() > 0


def test_the_nature_network_has_its_published_size():
    encoder = ConvEncoder((4, 84, 84))
    shapes = [tuple(layer.weight.shape) for layer in of_kind(encoder, nn.Conv2d | nn.Linear)]
    assert shapes == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136)]
    assert encoder.out_features == 512


def test_only_bytes_are_scaled():
    encoder, image = ConvEncoder((36, 36, 3)), torch.randint(256, (2, 36, 36, 3), dtype=torch.uint8)
    torch.testing.assert_close(encoder(image), encoder(image.float() / 255))


@pytest.mark.parametrize(
    "encoder", [VectorEncoder((3,)), GridEncoder((7, 7, 3)), ConvEncoder((36, 36, 3)), ConvEncoder((5, 36, 36))]
)
def test_leading_dimensions_are_kept(encoder):
    shape = getattr(encoder, "shape", (3,))
    x = torch.randn(2, 4, *shape)
    flat = encoder(x.flatten(0, 1))
    torch.testing.assert_close(encoder(x), flat.view(2, 4, -1))
    torch.testing.assert_close(encoder(x[0, 0]), flat[0])
    assert flat.shape == (8, encoder.out_features)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: VectorEncoder((7, 7, 3)), r"observations are \(7, 7, 3\); VectorEncoder takes vectors"),
        (lambda: GridEncoder((3,)), r"observations are \(3,\); GridEncoder takes grids"),
        (lambda: GridEncoder((4, 7, 3)), "at least 5x5"),
        (lambda: GridEncoder((7, 7, 3), channels=(1, 2)), "channels is"),
        (lambda: ConvEncoder((3,)), r"observations are \(3,\); ConvEncoder takes images"),
        (lambda: ConvEncoder((35, 84, 3)), "at least 36x36"),
        (lambda: ConvEncoder((3, 84, 35)), "at least 36x36"),
        (lambda: ConvEncoder((84, 84, 3), features=0), "features is 0"),
        (lambda: VectorEncoder((3,), widths=[0]), "widths is"),
        (lambda: VectorEncoder((3,), activation="swish"), "activation is 'swish'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, words):
    with pytest.raises(RecipeError, match=words):
        make()
