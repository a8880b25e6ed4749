"""Plain networks of a vector."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

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
        hidden: width of each hidden layer, at least one.
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
        self.body, width = dense_layers(in_features, hidden, activation, init)
        self.head = plain_linear(width, out_features, init)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x))
        return y
