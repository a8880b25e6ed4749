"""What the callbacks share that measure something every so many frames."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_hyper.algorithms import Algorithm
from lightning_hyper.analysis.looking import log_picture, picture_path
from lightning_hyper.checks import RecipeError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Measurements(Callback):
    """Logs measurements as `<name>/...`, keeps them in checkpoints, and draws them as `<name>.png` when training ends.

    Args:
        name: of metrics and picture; two callbacks of one class need two.
        every: frames between measurements.

    Attributes:
        rows: what was measured so far, with its `frames`.

    Raises:
        RecipeError: a number out of range.
    """

    def __init__(self, name: str, every: int, **counts: int) -> None:
        for key, count in {"every": every, **counts}.items():
            if count < 1:
                raise RecipeError(f"{self.key}.{key} is {count}; it must be at least 1")
        self.name, self.every = name, every
        self.rows: list[dict[str, float]] = []

    @property
    def key(self) -> str:
        """What a recipe calls it."""
        return f"trainer.callbacks {type(self).__name__}"

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__} {self.name}"

    def due(self, trainer: Trainer, model: Algorithm) -> bool:
        """Whether `every` frames have passed since the last row; only the first rank measures."""
        measured = self.rows[-1]["frames"] if self.rows else 0
        return bool(trainer.is_global_zero and model.clock.frames // self.every > measured // self.every)

    def add(self, trainer: Trainer, model: Algorithm, metrics: dict[str, float]) -> None:
        """Keep and log a row."""
        self.rows.append({"frames": model.clock.frames, **metrics})
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.name}/{key}": value for key, value in metrics.items()}, model.clock.frames)

    @abstractmethod
    def draw(self, model: Any) -> Figure:
        """The picture of `rows`, of which there is at least one."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.rows or not trainer.is_global_zero:
            return
        path = picture_path(trainer, f"{self.name}.png")
        self.draw(pl_module).savefig(path, dpi=150)
        log_picture(trainer, path)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])
