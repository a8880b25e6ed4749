"""When training ends because somebody asks."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info


class GracefulStop(Callback):
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a stop after the current batch, so that a checkpoint is written.

    One that reaches any of several ranks stops them all. A second one stops at once.

    Attributes:
        signal: the signal that this rank received, or None.
        stopped: whether training ends early because of one.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.stopped = False
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number in (getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)):
            self._previous[number] = signal.signal(number, self._receive)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False):
            self.stopped = trainer.should_stop = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        rank_zero_info("\nStopping after this batch and its checkpoint; once more stops at once.")
