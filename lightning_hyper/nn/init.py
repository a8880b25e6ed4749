"""Initialisation schemes, by name: of plain layers, and of the heads of a hypernetwork.

A base scheme fills the weight `[out, in]` and bias `[out]` of a plain linear layer. A hypernetwork scheme fills the
heads of one generated layer: what they emit should be worth starting from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_hyper.checks import OneOf
from lightning_hyper.nn.activations import GAINS

Weight = Float[Tensor, "out in"]
Bias = Float[Tensor, " out"]

# --- Base schemes ---------------------------------------------------------------------------------------------------


def default(weight: Weight, bias: Bias, gain: float) -> None:
    """U(+-gain / sqrt(in)) for weight and bias, which at gain 1 is how `nn.Linear` begins."""
    bound = gain / math.sqrt(weight.shape[1])
    weight.uniform_(-bound, bound)
    bias.uniform_(-bound, bound)


def normc(weight: Weight, bias: Bias, gain: float) -> None:
    """Rows of N(0, 1) scaled to Euclidean norm `gain`; bias 0."""
    rows = torch.randn_like(weight)
    weight.copy_(gain * rows / rows.norm(dim=1, keepdim=True))
    bias.zero_()


def orthogonal(weight: Weight, bias: Bias, gain: float) -> None:
    """(Semi-)orthogonal matrix times `gain`; bias 0 (Saxe et al. 2014)."""
    nn.init.orthogonal_(weight, gain)
    bias.zero_()


def kaiming(weight: Weight, bias: Bias, gain: float) -> None:
    """U(+-gain sqrt(3 / in)), of variance gain^2 / in; bias 0 (He et al. 2015, whose gain is sqrt(2), for ReLU)."""
    weight.uniform_(-1, 1).mul_(gain * math.sqrt(3 / weight.shape[1]))
    bias.zero_()


def xavier(weight: Weight, bias: Bias, gain: float) -> None:
    """U(+-gain sqrt(6 / (in + out))); bias 0 (Glorot and Bengio 2010)."""
    nn.init.xavier_uniform_(weight, gain)
    bias.zero_()


Base = Callable[[Weight, Bias, float], None]
BASE: dict[str, Base] = {
    "default": default,
    "normc": normc,
    "orthogonal": orthogonal,
    "kaiming": kaiming,
    "xavier": xavier,
}
Scheme = Annotated[str, OneOf(BASE)]


def base_scheme(name: str) -> Base:
    """A base scheme by its name in `BASE`."""
    return BASE[name]


def own_gain(scheme: str, activation: str) -> float:
    """Gain of a layer where a recipe names none: that of the activation after it, but 1 for PyTorch's own scheme."""
    return 1.0 if scheme == "default" else GAINS[activation]


# --- Hypernetwork schemes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A generated layer, as a scheme sees it.

    Attributes:
        weight, bias, gain: heads, linear layers from z to the layer's weight, bias and gain; gain may be missing.
        in_features, out_features: sizes of the generated layer.
        is_output: whether it is the last one of its network.
        base: draws a plain layer's weight `[out, in]` and bias `[out]`.
        scale: gain of the layer under a scheme without a base: that of the activation after it, or of the output.
    """

    weight: nn.Linear
    bias: nn.Linear
    gain: nn.Linear | None
    in_features: int
    out_features: int
    is_output: bool
    base: Callable[[Weight, Bias], None]
    scale: float = 1.0

    @property
    def z(self) -> int:
        return self.weight.in_features

    def draw(self) -> tuple[Tensor, Tensor]:
        """A fresh plain layer by the base scheme: weight flattened to `[out * in]`, and bias `[out]`."""
        weight, bias = torch.empty(self.out_features, self.in_features), torch.empty(self.out_features)
        self.base(weight, bias)
        return weight.flatten(), bias


def bias_hyperinit(layer: Layer) -> None:
    """Head weights 0, head biases a plain layer: the same network for every context (Beck et al. 2022)."""
    weight, bias = layer.draw()
    for head, start in ((layer.weight, weight), (layer.bias, bias)):
        head.weight.zero_()
        head.bias.copy_(start)


def weight_hyperinit(layer: Layer) -> None:
    """Each column of a head's weight an independent plain layer, head biases 0 (Beck et al. 2022).

    For a one-hot z every context so begins as a plain network of its own.
    """
    for k in range(layer.z):
        weight, bias = layer.draw()
        layer.weight.weight[:, k] = weight
        layer.bias.weight[:, k] = bias
    layer.weight.bias.zero_()
    layer.bias.bias.zero_()


def both_hyperinit(layer: Layer) -> None:
    """Half of Bias-HyperInit plus half of Weight-HyperInit (the published code's `init_wb`)."""
    weight_hyperinit(layer)
    weight, bias = layer.draw()
    for head, start in ((layer.weight, weight), (layer.bias, bias)):
        head.weight.mul_(0.5)
        head.bias.copy_(0.5 * start)


def hyperfan_in(layer: Layer) -> None:
    """Hyperfan-in (Chang et al. 2020): generated layers keep the variance of activations, for z of unit variance.

    The variance of the output is shared by W x and b: head weights of W are uniform with variance g^2 / (2 z in),
    those of b with variance g^2 / (2 z); head biases 0. g is the layer's gain, as in the recurrent paper's code: that
    of the activation, or `out_gain`. Chang et al. have sqrt(2) before a ReLU and 1 otherwise.
    """
    variance = layer.scale**2 / (2 * layer.z)
    for head, share in ((layer.weight, variance / layer.in_features), (layer.bias, variance)):
        head.weight.uniform_(-1, 1).mul_(math.sqrt(3 * share))
        head.bias.zero_()


def sarafian(layer: Layer) -> None:
    """Uniform heads of Sarafian et al. 2021: +-0.05 in hidden layers, +-0.008 in the output layer; head biases 0.

    The constants are for z of 1024 and 256 hidden units; at other widths they keep the generated weights' scale:
    0.05 sqrt(1024 / z), and 0.008 sqrt(1024 / z) sqrt(256 / in).
    """
    bound = (0.008 * math.sqrt(256 / layer.in_features) if layer.is_output else 0.05) * math.sqrt(1024 / layer.z)
    for head in (layer.weight, layer.bias, layer.gain):
        if head is not None:
            head.weight.uniform_(-bound, bound)
            head.bias.zero_()


def _plain_heads(base: Base) -> Callable[[Layer], None]:
    def scheme(layer: Layer) -> None:
        for head in (layer.weight, layer.bias):
            base(head.weight, head.bias, layer.scale)

    scheme.__doc__ = f"Heads begin as any linear layer would, by `{base.__name__}` with the generated layer's gain."
    return scheme


HYPERINIT = {"bias_hyperinit": bias_hyperinit, "weight_hyperinit": weight_hyperinit, "both_hyperinit": both_hyperinit}
HYPER: dict[str, Callable[[Layer], None]] = {
    **HYPERINIT,
    "hyperfan_in": hyperfan_in,
    "sarafian": sarafian,
    **{name: _plain_heads(scheme) for name, scheme in BASE.items()},
}
HyperScheme = Annotated[str, OneOf(HYPER)]


@torch.no_grad()
def initialize(name: str, layer: Layer) -> None:
    """Fill the heads of a generated layer by a hypernetwork scheme.

    Heads of the gain start at zero (a gain of one) unless the scheme says otherwise.

    Args:
        name: one of `HYPER`.
        layer: is filled.
    """
    if layer.gain is not None:
        layer.gain.weight.zero_()
        layer.gain.bias.zero_()
    HYPER[name](layer)
