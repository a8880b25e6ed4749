"""The one place that joins an algorithm and its experience to Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_hyper.algorithms import Algorithm
from lightning_hyper.checks import RecipeError
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.experience import Experience
from lightning_hyper.training.mlflow import MLflowLogger


class Run(Callback):
    """Hands sizes to the algorithm and its policy to the experience, evaluates at frames, and ends training by frames.

    After each evaluation it logs the metrics and calls `on_evaluation_end(trainer, pl_module, metrics)` of every
    callback that has such a method.

    Args:
        frames: budget of environment frames, all ranks together; the last batch is never cut, so up to one batch more
            is used. None has no end.
        seed: of the training environments.
        stop_at_return: end early once `eval/return` is at least this; None never does.
        weights: checkpoint whose weights training begins with.
        greeting: said when training begins; a command that fails before says nothing but why.

    Attributes:
        evaluated: metrics of the last evaluation.
        finished: whether the budget is spent, or the wanted return reached.
    """

    def __init__(
        self,
        frames: int | None,
        *,
        seed: int = 0,
        stop_at_return: float | None = None,
        weights: Path | None = None,
        greeting: str = "",
    ) -> None:
        if frames is not None and frames < 1:
            raise RecipeError(f"frames is {frames}; it must be at least 1")
        self.frames, self.seed, self.stop_at_return, self.weights = frames, seed, stop_at_return, weights
        self.greeting = greeting
        self.evaluated: dict[str, float] = {}
        self.finished = False
        self._evaluations = 0
        self._last_frame = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, Algorithm)
        data = experience(trainer)
        rank, ranks = trainer.global_rank, trainer.world_size
        data.connect(str(trainer.strategy.root_device), seed=self.seed, rank=rank, ranks=ranks)
        pl_module.clock.budget = self.frames
        if pl_module.spaces is None:
            pl_module.build(Spaces.of(data.env))
            if self.weights is not None:
                pl_module.begin_with(self.weights)
        pl_module.check(data.env.batch_size.numel(), data.steps)
        data.policy = pl_module.policy
        if stage == "fit":
            trainer.limit_val_batches = 0  # evaluations come at frames
            data.begin(pl_module.policy, folder=Path(trainer.default_root_dir), budget=self.frames)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Algorithm)
        if self.greeting:
            rank_zero_info(self.greeting)
        for logger in trainer.loggers:
            if isinstance(logger, MLflowLogger):
                logger.begin()
        frames, data = pl_module.clock.frames, experience(trainer)
        # Nothing that was due is owed: evaluations are made at the end of the batch in which they fall.
        self._evaluations = frames // data.evaluate_every if data.evaluate_every else 0
        if frames and data.env.why_not_exact:
            rank_zero_info(f"{data.env.why_not_exact}; training goes on with new episodes")
        if self.frames is not None and frames >= self.frames:
            self.finished = trainer.should_stop = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Algorithm)
        frames, every = pl_module.clock.frames, experience(trainer).evaluate_every
        spent = self.frames is not None and frames >= self.frames
        due = frames // every if every else 0
        if spent or due > self._evaluations:
            self._evaluations = due
            self._evaluate(trainer, pl_module)
            pl_module.log_dict(self.evaluated, logger=False, batch_size=1)  # for callbacks that monitor a metric
        if spent:
            self.finished = trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Of a training that something else has ended, such as a limit of steps.
        assert isinstance(pl_module, Algorithm)
        if self.frames is None and pl_module.clock.frames > self._last_frame:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: Trainer, model: Algorithm) -> None:
        policy = model.policy
        training, self._last_frame = policy.training, model.clock.frames
        policy.eval()
        metrics = experience(trainer).evaluate(policy)
        policy.train(training)
        self.evaluated = {key: float(value) for key, value in metrics.items()}
        for logger in trainer.loggers:
            logger.log_metrics(self.evaluated, model.clock.frames)
        reached = self.evaluated.get("eval/return")
        if self.stop_at_return is not None and reached is not None and reached >= self.stop_at_return:
            self.finished = trainer.should_stop = True
        for callback in cast(Any, trainer).callbacks:
            if hasattr(callback, "on_evaluation_end"):
                callback.on_evaluation_end(trainer, model, self.evaluated)


def experience(trainer: Trainer) -> Experience[Any]:
    """The experience that a trainer draws on."""
    return cast("Experience[Any]", cast(Any, trainer).datamodule)
