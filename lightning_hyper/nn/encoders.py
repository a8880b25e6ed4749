"""Encoders of observations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_hyper.nn.trunks import dense_layers


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
