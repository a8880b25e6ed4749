"""How much a retrieved value counts in the value loss (1 - alpha) (V - R)^2 + alpha (V - V_mem)^2."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_hyper.checks import RecipeError


class Alpha(ABC):
    """A rule for alpha."""

    @abstractmethod
    def __call__(self, confidence: Tensor, progress: float) -> Tensor:
        """Alpha `[B]`.

        Args:
            confidence: largest attention weight of each row, `[B]`.
            progress: share of the budget of frames that is spent.
        """


class DynamicAlpha(Alpha):
    """The largest attention weight, but no less than a floor; gradients flow where it is above.

    Args:
        floor: least alpha.

    Source: arXiv 2306.10698.
    """

    def __init__(self, *, floor: float = 0.1) -> None:
        self.floor = _share("floor", floor)

    def __call__(self, confidence: Tensor, progress: float) -> Tensor:
        return confidence.clamp(min=self.floor)


class FixedAlpha(Alpha):
    """The same alpha always.

    Args:
        value: alpha.
    """

    def __init__(self, *, value: float = 0.1) -> None:
        self.value = _share("value", value)

    def __call__(self, confidence: Tensor, progress: float) -> Tensor:
        return torch.full_like(confidence, self.value)


class DecayingAlpha(Alpha):
    """begin (1 - progress)^power.

    Args:
        begin: alpha at the first frame.
        power: how steeply it decays.

    Source: with begin 1 and power 2, an earlier form of arXiv 2306.10698's code.
    """

    def __init__(self, *, begin: float = 1.0, power: float = 2.0) -> None:
        self.begin, self.power = _share("begin", begin), power
        if power <= 0:
            raise RecipeError(f"model.alpha.power is {power}; it must be positive")

    def __call__(self, confidence: Tensor, progress: float) -> Tensor:
        return torch.full_like(confidence, self.begin * (1 - progress) ** self.power)


def _share(key: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise RecipeError(f"model.alpha.{key} is {value}; it must lie in [0, 1]")
    return value
