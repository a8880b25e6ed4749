"""What every algorithm shares: the frame clock, and the only backward, clip and step of the package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from lightning_hyper.algorithms.inference import Inference
from lightning_hyper.checkpoint_file import (
    EntryError,
    read_checkpoint,
    require_like,
    require_weights,
    taken_over,
    within,
)
from lightning_hyper.checks import Positive, RecipeError, checked
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.experience.returns import episode_metrics
from lightning_hyper.modules.normalization import ReturnScale


class NonFiniteLossError(RuntimeError):
    """A loss or gradient became NaN or infinite; nothing later than the last checkpoint is to be trusted."""


@dataclass
class FrameClock:
    """Counts environment frames, all ranks together: the x axis of everything.

    Attributes:
        frames: frames learned from so far.
        budget: frames at which training ends; None for no end.
    """

    frames: int = 0
    budget: int | None = None

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, from 0 to 1; 0 without a budget."""
        return min(1.0, self.frames / self.budget) if self.budget else 0.0


class Algorithm(LightningModule, ABC):
    """One collected batch in, all the updates that it owes made.

    A subclass says what its networks are (`build`), how they are optimised (`parameter_groups`, each with a `name`) and
    what one batch teaches (`learn`). It works without a trainer: `build(spaces)`, then `learn(batch)`.

    Args:
        max_grad_norm: largest gradient norm of each parameter group; None for no clipping.
        lr_schedule: `constant`, or `linear` decay to 0 over the budget of frames.

    Attributes:
        return_scale: divides rewards, where a subclass sets one.
        inference: trains a context source that has an objective of its own, where a subclass sets one.
    """

    adam_eps = 1e-8

    @checked
    def __init__(
        self, *, max_grad_norm: Positive | None = None, lr_schedule: Literal["constant", "linear"] = "constant"
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.max_grad_norm, self.lr_schedule = max_grad_norm, lr_schedule
        self.clock = FrameClock()
        self.spaces: Spaces | None = None
        self.return_scale: ReturnScale | None = None
        self.inference: Inference | None = None
        self._optimizer: Optimizer | None = None

    # What a subclass supplies.

    @abstractmethod
    def build(self, spaces: Spaces) -> None:
        """Make the networks for these sizes.

        Raises:
            RecipeError: parts that have no meaning together.
        """

    @property
    @abstractmethod
    def policy(self) -> TensorDictModuleBase:
        """What collects experience and is evaluated: `act(step, state) -> (choices, state)`."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for Adam, each with `name`, `params` and `lr`; `eps`, `max_grad_norm` where not the algorithm's."""

    @abstractmethod
    def learn(self, batch: Any) -> list[dict[str, Tensor]]:
        """Make all the updates that a batch owes; give what each update measured, by name."""

    def collected(self, batch: Any) -> TensorDict:
        """The newly collected frames of a batch, entries `[num_envs, time, ...]`."""
        return cast(TensorDict, batch)

    def experienced(self, batch: Any) -> dict[str, Tensor]:
        """What the environment gave that a batch teaches from, by name."""
        collected = self.collected(batch)
        shown = {"observation": collected["observation"], "reward": collected["next", "reward"]}
        return {**shown, "observation after a step": collected["next", "observation"]}

    def check(self, num_envs: int, steps: int) -> None:
        """Raise RecipeError where the recipe does not fit batches of `num_envs` times `steps` frames."""

    def save_state(self) -> dict[str, Any]:
        """What exact continuation needs of this rank alone, besides parameters and buffers; plain tensors."""
        parts = {"return_scale": self.return_scale, "inference": self.inference}
        return {name: part.save_state() for name, part in parts.items() if part is not None}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `save_state`.

        Raises:
            CheckpointError: it is of other types or shapes; names the entry.
        """
        with self.taken_over():
            require_like(state, self.save_state())
            if self.return_scale is not None:
                running = state["return_scale"].get("running", torch.zeros(1, 1))
                require_like(running, torch.zeros(0, 1), "return_scale", "running")
                self.return_scale.load_state(state["return_scale"])
            if self.inference is not None:
                with within("inference"):
                    self.inference.load_state(state["inference"], self.device)

    def taken_over(self) -> AbstractContextManager[None]:
        """Within, what is wrong with a state is said as a CheckpointError."""
        return taken_over("ranks", self.global_rank, "algorithm")

    # What a subclass uses.

    @property
    def optimizer(self) -> Optimizer:
        """Adam over the parameter groups, made when it is first asked for."""
        if self._optimizer is None:
            groups = [{"eps": self.adam_eps, **group, "initial_lr": group["lr"]} for group in self.parameter_groups()]
            self._optimizer = torch.optim.Adam(groups, fused=True)
        return self._optimizer

    def take_rates(self) -> None:
        """Give the optimiser this recipe's learning rates, where it has come with those of a checkpoint."""
        for group, wanted in zip(self.optimizer.param_groups, self.parameter_groups(), strict=True):
            group["lr"] = group["initial_lr"] = wanted["lr"]

    def update(self, loss: Tensor, groups: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Backward, clip and step: the only place in the package that does.

        Args:
            loss: a scalar.
            groups: names of the parameter groups to step; the others stay as they are. None means all.

        Returns:
            Norm of each stepped group's gradient before clipping, by name; empty without clipping.
        """
        every = self.optimizer.param_groups
        if self.lr_schedule == "linear":
            for group in every:
                group["lr"] = group["initial_lr"] * (1 - self.clock.progress)
        chosen = [group for group in every if groups is None or group["name"] in groups]
        names = [group["name"] for group in chosen]
        idle = [parameter for group in every if group["name"] not in names for parameter in group["params"]]
        for group in every:
            for parameter in group["params"]:
                parameter.grad = None
        trained = self._trainer is not None
        if trained and idle and self.trainer.world_size > 1:
            # DDP reduces every parameter in every backward: let the idle ones take part with a gradient of zero.
            loss = loss + 0.0 * torch.stack([p.sum() for p in idle]).sum()
        if trained:
            self.manual_backward(loss)
        else:
            loss.backward()
        for parameter in idle:
            parameter.grad = None
        norms = {}
        for group in chosen:
            if (most := group.get("max_grad_norm", self.max_grad_norm)) is not None:
                norms[f"{group['name']}_grad_norm"] = clip_grad_norm_(group["params"], most)
        cast(Optimizer, self.optimizers() if trained else self.optimizer).step()
        return norms

    # What Lightning calls.

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer

    def training_step(self, batch: Any, batch_idx: int) -> None:
        collected = self.collected(batch)
        frames = self.clock.frames + collected["next", "done"].numel() * self.trainer.world_size
        try:
            metrics = {f"loss/{name}": mean for name, mean in _means(self.learn(batch), frames).items()}
        except NonFiniteLossError as error:
            raise self._blamed(batch, frames) or error from None
        self.clock.frames = frames
        assert self.spaces is not None
        metrics |= episode_metrics(collected["next"], "train", task=collected.get("task"), tasks=self.spaces.tasks)
        if self.trainer.world_size > 1:
            mean = self.trainer.strategy.reduce
            metrics = {name: mean(value.to(self.device), reduce_op="mean") for name, value in metrics.items()}
        self.log_dict(metrics, batch_size=1, logger=False)  # for callbacks
        # Lightning would log what this batch has nothing of, such as the return of a task, with an earlier one's value.
        if (every := cast(Any, self.trainer).log_every_n_steps) and (batch_idx + 1) % every == 0:
            for logger in self.loggers:
                logger.log_metrics({name: float(value) for name, value in metrics.items()}, self.global_step)

    def _blamed(self, batch: Any, frames: int) -> NonFiniteLossError | None:
        """What to say instead of a loss that is not finite where the environment gave what is not."""
        for name, entry in self.experienced(batch).items():
            if entry.dtype.is_floating_point and not bool(entry.isfinite().all()):
                number = float(entry[~entry.isfinite()][0])
                return NonFiniteLossError(
                    f"data.env: {name} is {number} in what was collected up to frame {frames:,}. Nothing is learned "
                    "from it: training stops here, and no checkpoint is written from now on. Look at the environment, "
                    "or bound the actions that bring it there"
                )
        return None

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log_dict(batch, batch_size=1)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log_dict(batch, batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.spaces is not None
        checkpoint["frames"] = self.clock.frames
        checkpoint["spaces"] = self.spaces.asdict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.clock.frames = checkpoint["frames"]
        self._require_same_spaces(checkpoint, "ckpt_path: the checkpoint")
        with taken_over():
            require_weights(checkpoint["state_dict"], self.state_dict())
            self._require_optimizer(checkpoint.get("optimizer_states", []))

    def _require_optimizer(self, states: Any) -> None:
        parameters = [parameter for group in self.parameter_groups() for parameter in group["params"]]
        for state in states:
            for index, moments in state["state"].items():
                for name in ("exp_avg", "exp_avg_sq"):
                    if not 0 <= index < len(parameters) or moments[name].shape != parameters[index].shape:
                        raise EntryError("is of another model", "optimizer_states.0.state", index, name)
                    if not bool(moments[name].isfinite().all()):
                        raise EntryError("is NaN or infinite", "optimizer_states.0.state", index, name)

    # What a run asks before it begins.

    def begin_with(self, path: Path) -> None:
        """Take over the weights of a checkpoint.

        Raises:
            CheckpointError: it is missing, damaged or foreign.
            RecipeError: it is of other sizes or networks.
        """
        checkpoint = read_checkpoint(path, key="weights")
        self._require_same_spaces(checkpoint, f"weights: {path}")
        try:
            require_weights(checkpoint["state_dict"], self.state_dict())
        except EntryError as error:
            raise RecipeError(f"weights: {path} is of another model than this recipe's: its {error}") from error
        self.load_state_dict(checkpoint["state_dict"])

    def _require_same_spaces(self, checkpoint: dict[str, Any], what: str) -> None:
        there = Spaces(**checkpoint["spaces"])
        if self.spaces is None or not there.fits(self.spaces):
            raise RecipeError(f"{what} is for {there}, but data.env gives {self.spaces}")


def _means(updates: list[dict[str, Tensor]], frames: int) -> dict[str, Tensor]:
    """Mean over updates of what each measured, by name; not all need measure the same.

    Raises:
        NonFiniteLossError: something is NaN or infinite; names the update, and the batch by the frame that ends it.
    """
    names = {name: None for update in updates for name in update}
    columns = {name: torch.stack([u[name].detach() for u in updates if name in u]).float() for name in names}
    if columns and not bool(torch.cat(list(columns.values())).isfinite().all()):
        update, name, value = next(
            (k, name, float(value.detach()))
            for k, measured in enumerate(updates)
            for name, value in measured.items()
            if not bool(value.isfinite())
        )
        raise NonFiniteLossError(
            f"{name} is {value} in update {update + 1} of {len(updates)} on the batch that ends at frame {frames:,}. "
            "Training stops here, and no checkpoint is written from now on. A smaller learning rate or "
            "model.max_grad_norm is the usual cure; continue from the last checkpoint with --ckpt_path last"
        )
    return {name: column.mean() for name, column in columns.items()}
