"""The contract of sequence encoders: stepped or over a window, the features are the same."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Bool, Float
from torch import Tensor, nn

Steps = Float[Tensor, "B T in"]
State = Float[Tensor, "B {self.state_features}"]
Reset = Bool[Tensor, "B T"]
Features = Float[Tensor, "B T {self.out_features}"]


class SequenceEncoder(nn.Module, ABC):
    """Features of a sequence so far.

    A state is one flat tensor per row, all zeros when fresh.

    Attributes:
        out_features: features that come out of each step.
        state_features: size of the state.
    """

    out_features: int
    state_features: int

    @abstractmethod
    def forward(
        self, sequence: Steps, state: State | None = None, reset: Reset | None = None
    ) -> tuple[Features, State]:
        """Take a window in.

        Args:
            sequence: `[B, T, in]`.
            state: state before the window `[B, state_features]`; None for a fresh one.
            reset: where the state is made fresh before a step is taken in, bool `[B, T]`; None for nowhere.

        Returns:
            Features `[B, T, out_features]`, and the state after the last step `[B, state_features]`.
        """
