"""How much a retrieved value counts in the value loss (1 - alpha) (V - R)^2 + alpha (V - V_mem)^2."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_hyper.checks import Positive, Share, checked


class Alpha(ABC):
    """A rule for alpha."""

    @abstractmethod
    def __call__(self, confidence: Float[Tensor, " B"], progress: float) -> Float[Tensor, " B"]:
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

    @checked
    def __init__(self, *, floor: Share = 0.1) -> None:
        self.floor = floor

    def __call__(self, confidence: Float[Tensor, " B"], progress: float) -> Float[Tensor, " B"]:
        return confidence.clamp(min=self.floor)


class FixedAlpha(Alpha):
    """The same alpha always.

    Args:
        value: alpha.
    """

    @checked
    def __init__(self, *, value: Share = 0.1) -> None:
        self.value = value

    def __call__(self, confidence: Float[Tensor, " B"], progress: float) -> Float[Tensor, " B"]:
        return torch.full_like(confidence, self.value)


class DecayingAlpha(Alpha):
    """begin (1 - progress)^power.

    Args:
        begin: alpha at the first frame.
        power: how steeply it decays.

    Source: with begin 1 and power 2, an earlier form of arXiv 2306.10698's code.
    """

    @checked
    def __init__(self, *, begin: Share = 1.0, power: Positive = 2.0) -> None:
        self.begin, self.power = begin, power

    def __call__(self, confidence: Float[Tensor, " B"], progress: float) -> Float[Tensor, " B"]:
        return torch.full_like(confidence, self.begin * (1 - progress) ** self.power)
