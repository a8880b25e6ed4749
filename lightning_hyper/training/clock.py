"""When training ends: by frames, by return, or because somebody asks."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_hyper.algorithms import Algorithm


class FrameBudget(Callback):
    """Ends training when a budget of frames (all ranks together) is spent, or a return is reached.

    Args:
        frames: environment frames to train for; the last batch is never cut, so up to one batch more is used.
        stop_at_return: end early once `eval/return` is at least this; None never does.
    """

    def __init__(self, frames: int, stop_at_return: float | None = None) -> None:
        if frames < 1:
            raise ValueError(f"frames is {frames}; it must be at least 1")
        self.frames, self.stop_at_return = frames, stop_at_return

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, Algorithm)
        pl_module.clock.budget = self.frames

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_spent(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._stop_if_spent(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reached = trainer.callback_metrics.get("eval/return")
        if self.stop_at_return is not None and reached is not None and float(reached) >= self.stop_at_return:
            trainer.should_stop = True

    def _stop_if_spent(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Algorithm)
        if pl_module.clock.frames >= self.frames:
            trainer.should_stop = True


class GracefulStop(Callback):
    """Turns the first Ctrl-C or SIGTERM into a stop after the current batch, so that a checkpoint is written.

    A second one stops at once.

    Attributes:
        signal: the signal received, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False):
            trainer.should_stop = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        rank_zero_info("\nStopping after this batch and its checkpoint; once more stops at once.")
