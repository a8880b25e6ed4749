"""Trunks: the shared body of a hypernetwork, from context to the features z that its heads read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_hyper.checks import Positive, Range, Width, checked
from lightning_hyper.nn.activations import Activation
from lightning_hyper.nn.activations import activation as make_activation
from lightning_hyper.nn.init import Scheme, base_scheme, own_gain

Scale = Literal["td3", "sac"]


class Trunk(nn.Module):
    """`forward([*B, in]) -> [*B, out_features]`."""

    out_features: int


class MLPTrunk(Trunk):
    """Linear layers with an activation after each, the last one included.

    Args:
        in_features: features of the context.
        widths: width of each layer; (25,) is the embedding of the recurrent paper.
        activation: name of the activation.
        init: base scheme of the layers.
        gain: gain of the layers; null for 1 with `default`, and otherwise for that of the activation.
    """

    @checked
    def __init__(
        self,
        in_features: int,
        *,
        widths: Sequence[Width] = (25,),
        activation: Activation = "tanh",
        init: Scheme = "default",
        gain: Positive | None = None,
    ) -> None:
        super().__init__()
        self.layers, self.out_features = dense_layers(in_features, widths, activation, init, gain)

    def forward(self, context: Float[Tensor, "*B in"]) -> Float[Tensor, "*B {self.out_features}"]:
        z: Tensor = self.layers(context)
        return z


class ResidualTrunk(Trunk):
    """The primary network of Sarafian et al.: widening stages of residual blocks, no normalisation.

    Args:
        in_features: features of the context.
        widths: width of each stage.
        blocks: residual blocks x + W relu(W relu(x)) of each stage.
        features: features that a last linear layer gives (the paper's residual features have 10); null for no such
            layer.
        scale: constant of the uniform initialisation: `td3` 1 / (2 sqrt(in)), or `sac` 1 / sqrt(2 in).

    Source: ICML 2021 (arXiv 2106.06842), official TD3 and SAC code.
    """

    @checked
    def __init__(
        self,
        in_features: int,
        *,
        widths: Sequence[Width] = (256, 512, 1024),
        blocks: Annotated[int, Range(0, 100)] = 2,
        features: Width | None = None,
        scale: Scale = "td3",
    ) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for width in widths:
            stages += [nn.Linear(in_features, width), *(_Residual(width) for _ in range(blocks))]
            in_features = width
        if features is not None:
            stages.append(nn.Linear(in_features, features))
            in_features = features
        self.stages = nn.Sequential(*stages)
        self.out_features = in_features
        with torch.no_grad():
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    bound = 1 / math.sqrt((4 if scale == "td3" else 2) * layer.in_features)
                    layer.weight.uniform_(-bound, bound)

    def forward(self, context: Float[Tensor, "*B in"]) -> Float[Tensor, "*B {self.out_features}"]:
        z: Tensor = self.stages(context)
        return z


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        inside: Tensor = self.second(torch.relu(self.first(torch.relu(x))))
        return x + inside


def dense_layers(
    in_features: int, widths: Sequence[int], activation: str, init: str, gain: float | None
) -> tuple[nn.Sequential, int]:
    """Linear layers with an activation after each, and the features that come out."""
    layers: list[nn.Module] = []
    for width in widths:
        after = make_activation(activation)
        layers += [plain_linear(in_features, width, init, own_gain(init, activation) if gain is None else gain), after]
        in_features = width
    return nn.Sequential(*layers), in_features


def plain_linear(in_features: int, out_features: int, init: str, gain: float) -> nn.Linear:
    """A linear layer begun by a base scheme."""
    layer = nn.Linear(in_features, out_features)
    with torch.no_grad():
        base_scheme(init)(layer.weight, layer.bias, gain)
    return layer
