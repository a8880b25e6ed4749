"""Activation functions by name."""

from __future__ import annotations

from torch import nn

from lightning_hyper.checks import one_of

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "identity": nn.Identity,
}
# How much larger the weights before it must be for the scale of its output to stay; ELU and GELU count as rectifiers.
GAINS = {"tanh": 5 / 3, "relu": 2**0.5, "elu": 2**0.5, "gelu": 2**0.5, "identity": 1.0}


def activation(name: str) -> nn.Module:
    """A new activation module.

    Raises:
        RecipeError: the name is unknown.
    """
    one_of("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()
