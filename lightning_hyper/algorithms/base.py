"""What every algorithm shares: the frame clock, and the only backward, clip and step of the package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from lightning_hyper.checkpoint_file import read_checkpoint
from lightning_hyper.modules import Spaces
from lightning_hyper.modules.normalization import sum_over_ranks


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
    """One collected batch in, all the updates that it owes made, their means logged once.

    A subclass says what its networks are (`build`), how they are optimised (`configure_optimizers`, with a `name` for
    each parameter group) and what one batch teaches (`learn`).

    Args:
        max_grad_norm: largest gradient norm of each parameter group; None for no clipping.
        lr_schedule: `constant`, or `linear` decay to 0 over the budget of frames.

    Attributes:
        weights: checkpoint whose weights training begins with.
    """

    def __init__(self, *, max_grad_norm: float | None, lr_schedule: str) -> None:
        super().__init__()
        if lr_schedule not in ("constant", "linear"):
            raise ValueError(f"model.lr_schedule is {lr_schedule!r}; it must be 'constant' or 'linear'")
        if max_grad_norm is not None and max_grad_norm <= 0:
            raise ValueError(f"model.max_grad_norm is {max_grad_norm}; it must be positive, or null for no clipping")
        self.automatic_optimization = False
        self.max_grad_norm, self.lr_schedule = max_grad_norm, lr_schedule
        self.clock = FrameClock()
        self.spaces: Spaces | None = None
        self.weights: Path | None = None

    # What a subclass supplies.

    @abstractmethod
    def build(self, spaces: Spaces) -> None:
        """Make the networks for these sizes."""

    @property
    @abstractmethod
    def policy(self) -> TensorDictModuleBase:
        """What collects experience and is evaluated: reads observations, writes `action`."""

    @abstractmethod
    def learn(self, batch: Any) -> list[dict[str, Tensor]]:
        """Make all the updates that a batch owes; give what each update measured, by name."""

    @abstractmethod
    def returns(self, batch: TensorDict, prefix: str) -> dict[str, Tensor]:
        """Mean return of the episodes or trials that end in a batch, as metrics whose names begin with `prefix/`."""

    def collected(self, batch: Any) -> TensorDict:
        """The newly collected frames of a batch, `[num_envs]` or `[num_envs, time]`."""
        return cast(TensorDict, batch)

    def check(self, num_envs: int, steps: int) -> None:
        """Raise ValueError where the recipe does not fit batches of `num_envs` times `steps` frames."""

    def rank_state(self) -> dict[str, Any]:
        """What exact continuation needs of this rank alone, besides parameters and buffers; plain tensors."""
        return {}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Continue from `rank_state`."""

    # What Lightning calls.

    def configure_model(self) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.spaces is None:
            self.spaces = Spaces.of(data.env)
            self.build(self.spaces)
            if self.weights is not None:
                self._begin_with(self.weights)
        self.check(data.env.batch_size.numel(), data.steps)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self._schedule_learning_rate()
        collected = self.collected(batch)
        frames = self.clock.frames + collected["next", "done"].numel() * self.trainer.world_size
        metrics = {f"loss/{name}": mean for name, mean in _means(self.learn(batch), frames).items()}
        self.clock.frames = frames
        self._log({**metrics, **self.returns(collected, "train")})

    def validation_step(self, batch: TensorDict, batch_idx: int) -> None:
        self._log(self.returns(batch, "eval"))

    def test_step(self, batch: TensorDict, batch_idx: int) -> None:
        self._log(self.returns(batch, "test"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.spaces is not None
        checkpoint["frames"] = self.clock.frames
        checkpoint["spaces"] = self.spaces.asdict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.clock.frames = checkpoint["frames"]
        self._require_same_spaces(checkpoint, "ckpt_path: the checkpoint")

    # What a subclass uses.

    def update(self, loss: Tensor, groups: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Backward, clip and step: the only place in the package that does.

        Args:
            loss: a scalar.
            groups: names of the parameter groups to step; the others stay as they are. None means all.

        Returns:
            Norm of each stepped group's gradient before clipping, by name; empty without clipping.
        """
        optimizer = self.optimizers(use_pl_optimizer=True)
        assert not isinstance(optimizer, list)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        chosen = [g for g in optimizer.param_groups if groups is None or g["name"] in groups]
        idle = [
            p for g in optimizer.param_groups if groups is not None and g["name"] not in groups for p in g["params"]
        ]
        if idle and self.trainer.world_size > 1:
            # DDP reduces every parameter in every backward: let the idle ones take part with a gradient of zero.
            loss = loss + 0.0 * torch.stack([p.sum() for p in idle]).sum()
        self.manual_backward(loss)
        for parameter in idle:
            parameter.grad = None
        norms = {}
        if self.max_grad_norm is not None:
            norms = {f"{g['name']}_grad_norm": clip_grad_norm_(g["params"], self.max_grad_norm) for g in chosen}
        optimizer.step()
        return norms

    def _require_same_spaces(self, checkpoint: dict[str, Any], what: str) -> None:
        there = Spaces(**checkpoint["spaces"])
        if there != self.spaces:
            raise ValueError(f"{what} is for {there}, but data.env gives {self.spaces}")

    def _begin_with(self, path: Path) -> None:
        checkpoint = read_checkpoint(path, key="weights")
        self._require_same_spaces(checkpoint, f"weights: {path}")
        try:
            self.load_state_dict(checkpoint["state_dict"])
        except RuntimeError as error:
            said = " ".join(line.strip() for line in str(error).splitlines()[1:2])
            raise ValueError(f"weights: {path} is of another model than this recipe's: {said}") from error

    def _schedule_learning_rate(self) -> None:
        if self.lr_schedule == "linear":
            optimizer = self.optimizers(use_pl_optimizer=False)
            assert isinstance(optimizer, Optimizer)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * (1 - self.clock.progress)

    def _log(self, metrics: dict[str, Tensor]) -> None:
        self.log_dict(metrics, batch_size=1, sync_dist=self.trainer.world_size > 1)


def episode_returns(batch: TensorDict, prefix: str) -> dict[str, Tensor]:
    """Mean return of a trial, and of each of its episodes, over the trials that end in a batch.

    Args:
        batch: entries `[num_envs, time, ...]`; counts the trials that it holds from beginning to end.
        prefix: goes before the names `return` and `episode_1`, `episode_2`, ...
    """
    reward, done = batch["next", "reward"].squeeze(-1), batch["next", "done"].squeeze(-1)
    episode, start = batch["episode"].squeeze(-1), batch["is_init"].squeeze(-1)
    trial = start.long().cumsum(1)  # 0 before the first start within the batch
    whole = torch.zeros_like(reward, dtype=torch.bool)
    for k in range(1, int(trial.max()) + 1):
        inside = trial == k
        whole |= inside & (inside & done).any(1, keepdim=True)
    if not bool(whole.any()):
        return {}
    trials = (whole & done).sum()
    episodes = int(episode.max()) + 1
    sums = torch.zeros(episodes, device=reward.device).index_add_(0, episode[whole], reward[whole])
    means = sums / trials
    names = [f"{prefix}/episode_{k + 1}" for k in range(episodes)]
    return {f"{prefix}/return": means.sum(), **dict(zip(names, means, strict=True))}


def ended_episodes(batch: TensorDict, prefix: str, tasks: Sequence[str] = ()) -> dict[str, Tensor]:
    """Mean undiscounted return and length of the episodes that end in a batch (of all ranks), and return by task.

    Args:
        batch: under `next` it has `done`, `episode_return` and `step_count`, all of one shape `[..., 1]`.
        prefix: goes before the names `return`, `episode_length` and `return/<task>`.
        tasks: their names, where the batch has the index of a task in `task` `[...]`.
    """
    after, done = batch["next"], batch["next", "done"]
    total, frames = after["episode_return"][done].double(), after["step_count"][done].double()
    sums = [total.sum(), frames.sum(), done.sum().double()]
    if tasks:
        task = batch["task"][done.squeeze(-1)]
        for weight in (total, torch.ones_like(total)):
            sums += list(torch.zeros(len(tasks), dtype=total.dtype, device=total.device).index_add_(0, task, weight))
    ended = sum_over_ranks(torch.stack(sums)).cpu()
    if not ended[2]:
        return {}
    means = {f"{prefix}/return": ended[0] / ended[2], f"{prefix}/episode_length": ended[1] / ended[2]}
    for name, by_task, count in zip(tasks, *ended[3:].view(2, -1), strict=True) if tasks else ():
        if count:
            means[f"{prefix}/return/{name}"] = by_task / count
    return means


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
