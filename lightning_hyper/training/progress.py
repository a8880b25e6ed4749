"""Progress in frames."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as Base
from tqdm import tqdm

from lightning_hyper.algorithms import Algorithm

# Of a line on a terminal the first that leaves room for a bar is taken.
LAYOUTS = (
    "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} frames [{elapsed}<{remaining}, {rate_noinv_fmt}]  {long}",
    "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}] {short}",
    "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {short}",
    "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{remaining} left] {last}",
    "{percentage:3.0f}% {bar} {last}",
)
ENDLESS = ("{n_fmt} frames [{elapsed}, {rate_noinv_fmt}]  {long}", "{n_fmt} frames {short}", "{n_fmt} {last}")
SHORTEST = 8  # columns of a bar


class Line(tqdm):  # type: ignore[type-arg]
    """A bar with returns beside it, shortened until both are seen in the terminal's width.

    Attributes:
        returns: by metric, such as `eval/return`; the last of them is shown the longest.
    """

    returns: Mapping[str, float] = {}

    def __str__(self) -> str:
        state = self.format_dict
        returns = [f"{key} {value:.2f}" for key, value in self.returns.items()]
        short = [text.replace("/return", "") for text in returns]
        told = {"long": "  ".join(returns), "short": "  ".join(short), "last": "".join(short[-1:])}
        layouts, bar = (LAYOUTS, SHORTEST) if self.total else (ENDLESS, 0)
        for layout in layouts:
            text = self.format_meter(**{**state, **told, "ncols": None, "bar_format": layout.replace("{bar}", "")})
            if not state["ncols"] or len(text) + bar <= state["ncols"]:
                break
        return self.format_meter(**{**state, **told, "bar_format": layout})


class ProgressBar(Base):
    """One bar over the budget of frames on a terminal; elsewhere one line per evaluation.

    Shows frames, frames per second of this session, and the returns of training and of the last evaluation; on a
    narrow terminal less, but the bar and the last return always.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: Line | None = None
        self._enabled = True
        self._start = (0.0, 0)
        self._evaluated: dict[str, float] = {}

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # Lightning would print a table of its own beside ours.
        trainer.validate_loop.verbose = trainer.test_loop.verbose = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Algorithm)
        clock = pl_module.clock
        self._start = (time.perf_counter(), clock.frames)
        if self._enabled and trainer.is_global_zero and sys.stdout.isatty():
            self._bar = Line(
                total=clock.budget,
                initial=clock.frames,
                unit="",
                unit_scale=True,
                file=sys.stdout,
                dynamic_ncols=True,
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Algorithm)
        if self._bar is not None:
            self._bar.returns = _returns(trainer, self._evaluated)
            # The last batch may go beyond the budget, which tqdm would take for an unknown total.
            frames = min(pl_module.clock.frames, pl_module.clock.budget or pl_module.clock.frames)
            self._bar.update(frames - self._bar.n)

    def on_evaluation_end(self, trainer: Trainer, pl_module: LightningModule, metrics: Mapping[str, float]) -> None:
        """Show the return, and log how fast training has been so far; the training callback `Run` calls this."""
        assert isinstance(pl_module, Algorithm)
        clock = pl_module.clock
        self._evaluated = {key: value for key, value in metrics.items() if key == "eval/return"}
        seconds = time.perf_counter() - self._start[0]
        rate = (clock.frames - self._start[1]) / seconds
        for logger in trainer.loggers:
            logger.log_metrics({"time/frames_per_second": rate, "time/seconds": seconds}, clock.frames)
        if self._bar is None and self._enabled and trainer.is_global_zero:
            budget = f"/{clock.budget:,}" if clock.budget else ""
            returns = "  ".join(f"{key} {value:.2f}" for key, value in _returns(trainer, self._evaluated).items())
            print(f"frames {clock.frames:,}{budget}  {rate:,.0f} frames/s  {returns}", flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            _table(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _table(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.write(" ".join(map(str, args)))
        else:
            print(*args, **kwargs)


def _returns(trainer: Trainer, evaluated: dict[str, float]) -> dict[str, float]:
    return {**{k: float(v) for k, v in trainer.callback_metrics.items() if k == "train/return"}, **evaluated}


def _table(trainer: Trainer) -> None:
    if trainer.is_global_zero:
        for key, value in trainer.callback_metrics.items():
            print(f"{key:20} {float(value):10.3f}", flush=True)
