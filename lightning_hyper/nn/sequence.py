"""The contract of sequence encoders: stepped or over a window, the features are the same."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


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
        self, sequence: Tensor, state: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take a window in.

        Args:
            sequence: `[B, T, in]`.
            state: state before the window `[B, state_features]`; None for a fresh one.
            reset: where the state is made fresh before a step is taken in, bool `[B, T]`; None for nowhere.

        Returns:
            Features `[B, T, out_features]`, and the state after the last step `[B, state_features]`.
        """
