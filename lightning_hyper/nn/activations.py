"""Activation functions by name."""

from __future__ import annotations

from typing import Annotated

from torch import nn

from lightning_hyper.checks import OneOf

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "identity": nn.Identity,
}
# How much larger the weights before it must be for the scale of its output to stay; ELU and GELU count as rectifiers.
GAINS = {"tanh": 5 / 3, "relu": 2**0.5, "elu": 2**0.5, "gelu": 2**0.5, "identity": 1.0}

Activation = Annotated[str, OneOf(ACTIVATIONS)]


def activation(name: str) -> nn.Module:
    """A new activation module, by its name in `ACTIVATIONS`."""
    return ACTIVATIONS[name]()
