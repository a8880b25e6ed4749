"""Encoders of an observation: of a vector, of a grid of codes, of an image.

All share one constructor, `(shape, *, ...)` with the shape of one observation, and one call,
`forward([*B, *shape]) -> [*B, out_features]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from lightning_hyper.checks import Positive, RecipeError, Width, checked
from lightning_hyper.nn.activations import Activation
from lightning_hyper.nn.init import Scheme
from lightning_hyper.nn.trunks import dense_layers


class VectorEncoder(nn.Module):
    """Linear layers with an activation after each: `forward([*B, features]) -> [*B, out_features]`.

    Args:
        shape: shape `(features,)` of the vector, or their number.
        widths: width of each layer; none to give the vector as it is.
        activation: name of the activation.
        init: base scheme of the layers.
        gain: gain of the layers; null for 1 with `default`, and otherwise for that of the activation.

    Raises:
        RecipeError: a shape that is no vector's, a width that is not positive, an unknown activation or scheme.
    """

    @checked
    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        widths: Sequence[Width] = (32,),
        activation: Activation = "tanh",
        init: Scheme = "default",
        gain: Positive | None = None,
    ) -> None:
        super().__init__()
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        if len(sizes) != 1:
            raise RecipeError(
                f"observations are {sizes}; VectorEncoder takes vectors, GridEncoder grids of codes, ConvEncoder images"
            )
        self.layers, self.out_features = dense_layers(sizes[0], widths, activation, init, gain)

    def forward(self, x: Float[Tensor, "*B features"]) -> Float[Tensor, "*B {self.out_features}"]:
        y: Tensor = self.layers(x)
        return y


class GridEncoder(nn.Module):
    """Three 2x2 convolutions with a pooling after the first, for a small grid of integer codes, as MiniGrid's view.

    `forward([*B, width, height, codes]) -> [*B, out_features]`; a 7x7 view gives as many features as the last
    convolution has channels. A convolution sees the codes of a cell as numbers.

    Args:
        shape: width, height and codes of a cell.
        channels: channels of the three convolutions.

    Raises:
        RecipeError: a grid under 5x5, or channels that are not three positive numbers.

    Source: arXiv 2306.10698's code, after Willems' rl-starter-files.
    """

    @checked
    def __init__(self, shape: Sequence[int], *, channels: Sequence[Width] = (16, 32, 64)) -> None:
        super().__init__()
        if len(shape) != 3 or min(shape[:2]) < 5:
            raise RecipeError(
                f"observations are {tuple(shape)}; GridEncoder takes grids (width, height, codes) of at "
                "least 5x5 cells, such as MiniGrid's"
            )
        if len(channels) != 3:
            raise RecipeError(f"channels is {list(channels)}; it must be three numbers")
        self.shape = tuple(shape)
        first, second, third = channels
        self.layers = nn.Sequential(
            nn.Conv2d(shape[2], first, 2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 2),
            nn.ReLU(),
            nn.Conv2d(second, third, 2),
            nn.ReLU(),
        ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as cells lie: backward twice as fast
        width, height = ((size - 1) // 2 - 2 for size in shape[:2])
        self.out_features = third * width * height

    def forward(
        self, x: Real[Tensor, "*B {self.shape[0]} {self.shape[1]} {self.shape[2]}"]
    ) -> Float[Tensor, "*B {self.out_features}"]:
        cells = x.reshape(-1, *self.shape).movedim(-1, 1).float()
        y: Tensor = self.layers(cells)
        return y.reshape(*x.shape[:-3], self.out_features)


class ConvEncoder(nn.Module):
    """The convolutions of DQN on an image: 32 of 8x8 by 4, 64 of 4x4 by 2, 64 of 3x3 by 1, and a dense layer; ReLU.

    `forward([*B, *shape]) -> [*B, out_features]`. Bytes (uint8) are divided by 255; other numbers are left as they are.

    Args:
        shape: shape of an image, height x width x channels where the last is 1, 3 or 4, else channels x height x width.
        features: width of the dense layer.

    Raises:
        RecipeError: a shape that is no image's, or an image under 36x36.

    Source: Mnih et al. 2015 (their 84x84 images give 3,136 numbers to the dense layer).
    """

    @checked
    def __init__(self, shape: Sequence[int], *, features: Width = 512) -> None:
        super().__init__()
        self.shape, self.out_features = tuple(shape), features
        self.channels_last = self.shape[-1:] in ((1,), (3,), (4,))
        sides = shape[:2] if self.channels_last else shape[1:]
        if len(shape) != 3 or min(sides) < 36:
            raise RecipeError(
                f"observations are {tuple(shape)}; ConvEncoder takes images of at least 36x36, height x "
                "width x channels or channels x height x width"
            )
        channels = (shape[-1] if self.channels_last else shape[0], 32, 64, 64)
        layers: list[nn.Module] = []
        for (inputs, outputs), size, stride in zip(pairwise(channels), (8, 4, 3), (4, 2, 1), strict=True):
            layers += [nn.Conv2d(inputs, outputs, size, stride), nn.ReLU()]
            sides = [(side - size) // stride + 1 for side in sides]
        self.layers = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(channels[-1] * sides[0] * sides[1], features), nn.ReLU()
        )

    def forward(
        self, x: Real[Tensor, "*B {self.shape[0]} {self.shape[1]} {self.shape[2]}"]
    ) -> Float[Tensor, "*B {self.out_features}"]:
        image = x.reshape(-1, *self.shape)
        if self.channels_last:
            image = image.movedim(-1, 1)
        y: Tensor = self.layers(image / 255 if image.dtype == torch.uint8 else image)
        return y.reshape(*x.shape[:-3], self.out_features)
