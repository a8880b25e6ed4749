"""What every source of experience shares: environments, exact collection, evaluation that disturbs nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningDataModule
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs.utils import ExplorationType, set_exploration_type

from lightning_hyper.envs import BatchedEnv


class Experience(LightningDataModule, ABC):
    """Collects batches with the module's own policy when they are asked for, and evaluates it on environments apart.

    Args:
        env: makes the environment; its size `num_envs` is that of each rank.
        batches_per_epoch: collected batches between evaluations and checkpoints.
        eval_envs: episodes (or trials) of an evaluation, side by side.
        eval_mode: evaluate the most likely action (`deterministic`) or draw it (`sampled`).
        eval_seed: seed of the evaluation, the same at every evaluation and apart from training's.
        seed: seed of the training environments; the recipe's `seed` sets it.
    """

    def __init__(
        self,
        env: Callable[[], BatchedEnv],
        *,
        batches_per_epoch: int = 10,
        eval_envs: int = 128,
        eval_mode: Literal["deterministic", "sampled"] = "deterministic",
        eval_seed: int = 1_000_003,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for key, value in (("batches_per_epoch", batches_per_epoch), ("eval_envs", eval_envs)):
            if value < 1:
                raise ValueError(f"data.{key} is {value}; it must be at least 1")
        if eval_mode not in ("deterministic", "sampled"):
            raise ValueError(f"data.eval_mode is {eval_mode!r}; it must be 'deterministic' or 'sampled'")
        self.make_env: Callable[..., BatchedEnv] = env  # its arguments may be given anew, by keyword
        self.batches_per_epoch, self.eval_envs, self.seed = batches_per_epoch, eval_envs, seed
        self.eval_mode, self.eval_seed = eval_mode, eval_seed
        self._source: Any = None  # what `begin` made
        self._restored: dict[str, Any] | None = None

    # What a subclass supplies.

    @property
    @abstractmethod
    def steps(self) -> int:
        """Frames of each environment in a batch."""

    @abstractmethod
    def begin(self, restored: dict[str, Any] | None) -> Any:
        """A sized iterable of collected batches with a `state_dict`; where `restored` is one, it goes on from there."""

    # What it does unless a subclass says otherwise.

    def evaluate(self) -> TensorDict:
        """What the policy does in `eval_env`, begun afresh."""
        return first_episodes(self.eval_env, self.policy)

    def save_buffer(self, folder: Path) -> bool:
        """Write what is too large for a checkpoint into a folder; False where there is nothing of the kind."""
        return False

    def restore_buffer(self, folder: Path) -> None:
        """Read what `save_buffer` wrote when collection begins."""

    def collection_state(self) -> dict[str, Any]:
        """State of this rank's collection: what exact continuation needs, apart from the policy."""
        return self._source.state_dict() if self._source is not None else {}

    def restore_collection(self, state: dict[str, Any]) -> None:
        """Continue from `collection_state` when collection begins."""
        self._restored = state or None

    # What Lightning calls.

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        device = self.trainer.strategy.root_device
        self.env = self.make_env(device=str(device))
        self.env.set_seed(self.seed + 7919 * self.trainer.global_rank)
        # The wide environment that training uses has no part in an evaluation.
        self.eval_env = self.make_env(device=str(device), num_envs=self.eval_envs)

    def train_dataloader(self) -> Any:
        if self._source is None:
            self._source = self.begin(self._restored)
        return self._source

    def val_dataloader(self) -> Evaluation:
        return self._evaluation(0)

    def test_dataloader(self) -> Evaluation:
        return self._evaluation(1)

    def _evaluation(self, offset: int) -> Evaluation:
        assert self.trainer is not None
        seed = self.eval_seed + offset + 7919 * self.trainer.global_rank
        deterministic = self.eval_mode == "deterministic"
        return Evaluation(self.eval_env, self.evaluate, seed, deterministic=deterministic)

    @property
    def policy(self) -> TensorDictModuleBase:
        """The policy under training, as the algorithm has it now."""
        assert self.trainer is not None
        return cast(TensorDictModuleBase, cast(Any, self.trainer.lightning_module).policy)


class Evaluation:
    """A sized iterable of one batch: what a policy does from a fixed seed, training left untouched.

    Args:
        env: batched environment of its own.
        roll: makes the batch.
        seed: of the environment, and of the actions where they are drawn.
        deterministic: take the most likely action rather than draw one.
    """

    def __init__(self, env: BatchedEnv, roll: Callable[[], TensorDict], seed: int, *, deterministic: bool) -> None:
        self.env, self.roll, self.seed, self.deterministic = env, roll, seed, deterministic

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[TensorDict]:
        mode = ExplorationType.DETERMINISTIC if self.deterministic else ExplorationType.RANDOM
        device = self.env.device
        devices = [device] if device is not None and device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad(), set_exploration_type(mode):
            torch.manual_seed(self.seed)
            self.env.set_seed(self.seed)
            batch = self.roll()
        yield batch


class Collection:
    """Batches of `steps` frames from each environment, carried on exactly from one to the next.

    Args:
        env: batched environment.
        policy: reads and writes one step, `[num_envs, ...]`.
        steps: frames of each environment in a batch.
    """

    def __init__(self, env: BatchedEnv, policy: TensorDictModuleBase, steps: int) -> None:
        self.env = env
        self.collector = Collector(
            env,
            policy,
            frames_per_batch=steps * env.batch_size.numel(),
            total_frames=-1,
            track_traj_ids=False,
            auto_register_policy_transforms=False,
            trust_policy=True,
            exploration_type=ExplorationType.RANDOM,
        )
        self._collected = iter(self.collector)

    def collect(self) -> TensorDict:
        """One batch `[num_envs, time]`, by the policy as it is now."""
        return cast(TensorDict, next(self._collected))

    @property
    def carried(self) -> TensorDict:
        """Where each environment stands, `[num_envs]`: the entries that the next batch begins with."""
        # What TorchRL's collector takes from one batch into the next is private to it, and its own state_dict leaves
        # it out. tests/experience/test_rollouts.py notices when it is renamed.
        return cast(TensorDict, self.collector._carrier)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next batch depends on, apart from policy and global generators; plain tensors."""
        env: dict[str, Tensor] = {key: value.clone() for key, value in self.env.save_state().items()}
        return {"carried": self.carried.clone().to_dict(), "env": env}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.env.load_state(state["env"])
        carried = TensorDict(state["carried"], batch_size=self.env.batch_size).to(self.env.device)
        if self.carried.device is None:
            carried.clear_device_()
        self.collector._carrier = carried


def first_episodes(env: BatchedEnv, policy: TensorDictModuleBase) -> TensorDict:
    """The first whole episode of each environment, as the step that ends it: entries `[num_envs, ...]`.

    Under `next` it has `done`, `episode_return` and `step_count`, and besides `task` where the environment shows it.
    """
    step = env.reset()
    over = torch.zeros(*env.batch_size, 1, dtype=torch.bool, device=env.device)
    ends = {key: torch.zeros_like(step[key]) for key in ("episode_return", "step_count")}
    batch: dict[str, Any] = {"task": step["task"].clone()} if "task" in step.keys() else {}  # noqa: SIM118
    # What has ended is stepped on without a reset, which may have a level to make and would be for nothing.
    while not bool(over.all()):
        stepped = env.step(policy(step))
        step = env.step_mdp(stepped)
        fresh = stepped["next", "done"] & ~over
        for key, end in ends.items():
            end.copy_(torch.where(fresh, stepped["next", key], end))
        over |= fresh
    return TensorDict({**batch, "next": {**ends, "done": over}}, batch_size=env.batch_size)
