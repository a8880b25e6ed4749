"""Plain networks of a vector or of a grid of codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hyper.nn.trunks import dense_layers, plain_linear


class VectorEncoder(nn.Module):
    """Linear layers with an activation after each: `forward([*B, in]) -> [*B, out_features]`.

    Args:
        in_features: features of the vector.
        widths: width of each layer.
        activation: name of the activation.
        init: base scheme of the layers.
    """

    def __init__(
        self, in_features: int, *, widths: Sequence[int] = (32,), activation: str = "tanh", init: str = "default"
    ) -> None:
        super().__init__()
        self.layers, self.out_features = dense_layers(in_features, widths, activation, init)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class MLP(nn.Module):
    """Linear layers with an activation between them: `forward([*B, in]) -> [*B, out]`.

    Args:
        in_features: features of the vector.
        out_features: features of the output.
        hidden: width of each hidden layer; none for a linear layer alone.
        activation: name of the activation.
        init: base scheme of the layers.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hidden: Sequence[int] = (256, 256),
        activation: str = "relu",
        init: str = "default",
    ) -> None:
        super().__init__()
        self.body: nn.Module = nn.Identity()
        if hidden:
            self.body, in_features = dense_layers(in_features, hidden, activation, init)
        self.head = plain_linear(in_features, out_features, init)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x))
        return y


class GridEncoder(nn.Module):
    """Three 2x2 convolutions with a pooling after the first, for a small grid of integer codes, as MiniGrid's view.

    `forward([*B, width, height, codes]) -> [*B, out_features]`; a 7x7 view gives as many features as the last
    convolution has channels.

    Args:
        shape: width, height and codes of a cell.
        channels: channels of the three convolutions.
        codes: what a convolution sees of a cell: its codes as `numbers`, as in the paper; or `planes`, one for each
            value of each code.
        values: how many values each code has; for `planes`.

    Raises:
        ValueError: a grid under 5x5, or an option out of range.

    Source: arXiv 2306.10698's code, after Willems' rl-starter-files.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        channels: Sequence[int] = (16, 32, 64),
        codes: Literal["numbers", "planes"] = "numbers",
        values: Sequence[int] = (11, 6, 3),
    ) -> None:
        super().__init__()
        if len(shape) != 3 or min(shape[:2]) < 5:
            raise ValueError(
                f"encoder: observations are {tuple(shape)}; GridEncoder takes grids (width, height, codes) of at least "
                "5x5 cells, such as MiniGrid's"
            )
        if codes not in ("numbers", "planes"):
            raise ValueError(f"encoder.codes is {codes!r}; it must be 'numbers' or 'planes'")
        if codes == "planes" and len(values) != shape[2]:
            raise ValueError(f"encoder.values is {list(values)}; it needs one number for each of {shape[2]} codes")
        if len(channels) != 3 or min(channels) < 1:
            raise ValueError(f"encoder.channels is {list(channels)}; it must be three positive numbers")
        self.shape, self.codes, self.values = tuple(shape), codes, tuple(values)
        planes = sum(values) if codes == "planes" else shape[2]
        first, second, third = channels
        self.layers = nn.Sequential(
            nn.Conv2d(planes, first, 2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 2),
            nn.ReLU(),
            nn.Conv2d(second, third, 2),
            nn.ReLU(),
        ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as cells lie: backward twice as fast
        width, height = ((size - 1) // 2 - 2 for size in shape[:2])
        self.out_features = third * width * height

    def forward(self, x: Tensor) -> Tensor:
        lead = x.shape[:-3]
        cells = x.reshape(-1, *self.shape)
        if self.codes == "planes":
            parts = [F.one_hot(cells[..., k].long(), size) for k, size in enumerate(self.values)]
            cells = torch.cat(parts, -1)
        y: Tensor = self.layers(cells.movedim(-1, 1).float())
        return y.reshape(*lead, self.out_features)
