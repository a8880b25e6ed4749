"""What every source of experience shares: environments, collection, evaluation that disturbs nothing."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from lightning_hyper.checkpoint_file import require_like, taken_over
from lightning_hyper.checks import Count, Frames, RecipeError, Seed, at, checked
from lightning_hyper.envs import BatchedEnv
from lightning_hyper.experience.collection import Collection, Policy, first_episodes
from lightning_hyper.experience.returns import episode_metrics, metric_names

Batch = TypeVar("Batch")
ENDLESS = 2**31 - 1  # batches of a training that its budget of frames ends


def rank_seed(seed: int, rank: int) -> int:
    """Seed of a process: ranks draw apart, and rank 0 as a single process does."""
    return seed + 7919 * rank


class Experience(LightningDataModule, ABC, Generic[Batch]):
    """Collects batches with a policy when they are asked for, and evaluates policies on environments apart.

    It needs no trainer: `connect()` makes the environments, `begin(policy)` says who acts, `collect()` gives a batch.

    Args:
        env: makes the environment; its size `num_envs` is that of each rank.
        evaluate_every: frames, all ranks together, between evaluations and checkpoints; null for one at the end alone.
        eval_envs: episodes (or trials) of an evaluation, side by side.
        eval_mode: evaluate the most likely action (`deterministic`) or draw it (`sampled`).
        eval_seed: seed of the evaluation, the same at every evaluation and apart from training's.

    Attributes:
        policy: what Lightning's own `validate` and `test` evaluate.
    """

    policy: Policy

    @checked
    def __init__(
        self,
        env: Callable[[], BatchedEnv],
        *,
        evaluate_every: Frames | None = 10_000,
        eval_envs: Count = 10,
        eval_mode: Literal["deterministic", "sampled"] = "deterministic",
        eval_seed: Seed = 1_000_003,
    ) -> None:
        super().__init__()
        self.make_env: Callable[..., BatchedEnv] = env  # its arguments may be given anew, by keyword
        self.evaluate_every, self.eval_envs = evaluate_every, eval_envs
        self.eval_mode, self.eval_seed = eval_mode, eval_seed
        self.rank, self.ranks = 0, 1
        self.collection: Collection | None = None

    def connect(self, device: str = "cpu", *, seed: int = 0, rank: int = 0, ranks: int = 1) -> None:
        """Make the environments of this rank.

        Args:
            device: where their tensors live.
            seed: of the training environments.
            rank, ranks: which of how many processes this is.

        Raises:
            RecipeError: an environment that cannot be made, or a callback that monitors what no evaluation measures.
        """
        self.rank, self.ranks = rank, ranks
        with at("data.env"):
            self.env = self.make_env(device=device)
        self.env.set_seed(rank_seed(seed, rank))
        try:
            with at("data.eval_envs"):
                self._eval_env = self.make_env(device=device, num_envs=self.eval_envs)
        except RecipeError as error:
            raise RecipeError(str(error).replace("data.env.num_envs", "data.eval_envs")) from error
        self._eval_env.in_turn = True
        if self.trainer is not None:
            self._check_monitors(cast(Any, self.trainer).callbacks)

    def _check_monitors(self, callbacks: Sequence[Any]) -> None:
        env = self._eval_env
        known = metric_names("eval", env.tasks, getattr(env, "episodes", 0))
        for callback in callbacks:
            name = getattr(callback, "monitor", None)
            # What updates measure is known only once there was one.
            if isinstance(name, str) and name not in known and not name.startswith(("loss/", "train/")):
                near = difflib.get_close_matches(name, known, n=1)
                meant = f"did you mean {near[0]}?" if near else f"evaluations measure {', '.join(known[:8])}"
                kind = type(callback).__name__
                key = "checkpoint" if isinstance(callback, Checkpoint) else f"trainer.callbacks {kind}"
                raise RecipeError(f"{key}.monitor is {name!r}; {meant}")

    @property
    @abstractmethod
    def steps(self) -> int:
        """Frames of each environment in a batch."""

    @abstractmethod
    def begin(self, policy: Any, *, folder: Path | None = None, budget: int | None = None) -> None:
        """Say who acts from now on.

        Args:
            policy: the policy under training.
            folder: where what is too large for memory may be kept.
            budget: frames that training is to take.

        Raises:
            RecipeError: options that do not go with the environment or the policy.
        """

    @abstractmethod
    def collect(self) -> Batch:
        """The next batch, by the policy as it is now."""

    def save_state(self) -> dict[str, Any]:
        """What exact continuation needs of this rank, apart from policy and buffer; plain tensors."""
        return {} if self.collection is None else self.collection.save_state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `save_state`, after `begin`.

        Raises:
            CheckpointError: it is of other types or shapes; names the entry.
        """
        if self.collection is not None:
            with taken_over("ranks", self.rank, "experience"):
                require_like(state, self.save_state())
                self.collection.load_state(state)

    def save_buffer(self, folder: Path) -> bool:
        """Write what is too large for a checkpoint into a folder; False where there is nothing of the kind."""
        return False

    def load_buffer(self, folder: Path) -> None:
        """Continue from `save_buffer`, after `begin` and `load_state`.

        Raises:
            CheckpointError: it is missing, damaged, or of another run or frame.
        """

    def evaluate(self, policy: Policy, prefix: str = "eval", *, offset: int = 0) -> dict[str, Tensor]:
        """Metrics of the first episodes of `eval_envs` environments; training and its generators are left untouched.

        Args:
            policy: is evaluated.
            prefix: goes before the names of the metrics.
            offset: added to the seed: other episodes.
        """
        device = self.env.device
        env, seed = self._eval_env, rank_seed(self.eval_seed + offset, self.rank)
        devices = [device] if device is not None and device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            env.set_seed(seed)
            ends = first_episodes(env, policy, deterministic=self.eval_mode == "deterministic")
        by_episode, task = ends.pop("by_episode", None), ends.pop("task", None)
        return episode_metrics(ends, prefix, task=task, tasks=getattr(env, "tasks", ()), by_episode=by_episode)

    # What Lightning calls.

    def train_dataloader(self) -> Batches:
        return Batches(self.collect)

    def val_dataloader(self) -> Batches:
        return Batches(lambda: self.evaluate(self.policy), 1)

    def test_dataloader(self) -> Batches:
        return Batches(lambda: self.evaluate(self.policy, "test", offset=1), 1)


class Batches:
    """A sized iterable of batches that are made when they are asked for; an unsized one would be read one ahead."""

    def __init__(self, make: Callable[[], Any], length: int = ENDLESS) -> None:
        self.make, self.length = make, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return (self.make() for _ in range(self.length))
