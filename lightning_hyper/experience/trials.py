"""On-policy experience over trials: one Lightning batch is one collected batch, collected when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningDataModule
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector
from torchrl.envs.utils import ExplorationType, set_exploration_type

from lightning_hyper.envs import TrialEnv

EnvFactory = Callable[[], TrialEnv]


class TrialRollouts(LightningDataModule):
    """Collects `steps` frames from each of the environment's trials per batch, with the module's own policy.

    A batch is a TensorDict `[num_envs]` with entries `[num_envs, time, ...]`: what the environment shows, what the
    policy wrote, and under `next` what followed; `hidden` `[num_envs, state_features]` is the policy's state before
    the window, `next, hidden` its state after each step. Nothing is collected ahead: the next batch is made by the
    policy as the last one left it.

    Args:
        env: makes the environment; its size `num_envs` is that of each rank.
        steps: frames of each environment in a batch; null for one whole trial. The hidden state crosses batches.
        batches_per_epoch: collected batches between evaluations and checkpoints.
        eval_envs: trials of an evaluation, side by side.
        eval_mode: evaluate the most likely action (`deterministic`) or draw it (`sampled`).
        eval_seed: seed of the evaluation's tasks, the same at every evaluation and apart from training's.
        seed: seed of the training tasks; the recipe's `seed` sets it.
    """

    def __init__(
        self,
        env: EnvFactory,
        *,
        steps: int | None = None,
        batches_per_epoch: int = 10,
        eval_envs: int = 128,
        eval_mode: Literal["deterministic", "sampled"] = "deterministic",
        eval_seed: int = 1_000_003,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for key, value in (("steps", steps), ("batches_per_epoch", batches_per_epoch), ("eval_envs", eval_envs)):
            if value is not None and value < 1:
                raise ValueError(f"data.{key} is {value}; it must be at least 1")
        if eval_mode not in ("deterministic", "sampled"):
            raise ValueError(f"data.eval_mode is {eval_mode!r}; it must be 'deterministic' or 'sampled'")
        self.make_env: Callable[..., TrialEnv] = env  # its arguments may be given anew, by keyword
        self.batches_per_epoch, self.eval_envs, self.seed = batches_per_epoch, eval_envs, seed
        self.eval_mode, self.eval_seed = eval_mode, eval_seed
        self._steps = steps
        self._rollouts: Rollouts | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def steps(self) -> int:
        """Frames of each environment in a batch."""
        return self._steps or self.env.horizon

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        device = self.trainer.strategy.root_device
        self.env = self.make_env(device=str(device))
        self.env.set_seed(self.seed + 7919 * self.trainer.global_rank)
        # The wide environment that training uses has no part in an evaluation.
        self.eval_env = self.make_env(device=str(device), num_envs=self.eval_envs)

    def train_dataloader(self) -> Rollouts:
        assert self.trainer is not None
        if self._rollouts is None:
            policy = cast(Any, self.trainer.lightning_module).policy
            self._rollouts = Rollouts(self.env, policy, self.steps, self.batches_per_epoch)
            if self._restored is not None:
                self._rollouts.load_state_dict(self._restored)
        return self._rollouts

    def val_dataloader(self) -> Evaluation:
        return self._evaluation(0)

    def test_dataloader(self) -> Evaluation:
        return self._evaluation(1)

    def _evaluation(self, offset: int) -> Evaluation:
        assert self.trainer is not None
        policy = cast(Any, self.trainer.lightning_module).policy
        seed = self.eval_seed + offset + 7919 * self.trainer.global_rank
        return Evaluation(self.eval_env, policy, seed, deterministic=self.eval_mode == "deterministic")

    def collection_state(self) -> dict[str, Any]:
        """State of this rank's collection: what exact continuation needs, apart from the policy."""
        return self._rollouts.state_dict() if self._rollouts is not None else {}

    def restore_collection(self, state: dict[str, Any]) -> None:
        """Continue from `collection_state` when collection begins."""
        self._restored = state or None


class Rollouts:
    """A sized iterable of collected batches (an unsized one would be read one batch ahead).

    Args:
        env: batched environment.
        policy: reads and writes one step, `[num_envs, ...]`.
        steps: frames of each environment in a batch.
        batches: length of one pass.
    """

    def __init__(self, env: TrialEnv, policy: TensorDictModuleBase, steps: int, batches: int) -> None:
        self.env, self.batches = env, batches
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

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[TensorDict]:
        for _ in range(self.batches):
            yield self.collect()

    def collect(self) -> TensorDict:
        """One batch, by the policy as it is now."""
        before = self._carried.get("hidden", None)
        batch = cast(TensorDict, next(self._collected))
        after = batch.pop("hidden")
        batch.batch_size = batch.batch_size[:1]
        batch["next", "hidden"] = after
        batch["hidden"] = torch.zeros_like(after[:, 0]) if before is None else before
        return batch

    @property
    def _carried(self) -> TensorDict:
        # What TorchRL's collector takes from one batch into the next is private to it, and its own state_dict leaves
        # it out. tests/experience/test_trials.py notices when it is renamed.
        return cast(TensorDict, self.collector._carrier)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next batch depends on, apart from policy and global generators; plain tensors."""
        env = {key: value.clone() for key, value in self.env.save_state().items()}
        return {"carried": self._carried.clone().to_dict(), "env": env}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.env.load_state(state["env"])
        carried = TensorDict(state["carried"], batch_size=self.env.batch_size).to(self.env.device)
        if self._carried.device is None:
            carried.clear_device_()
        self.collector._carrier = carried


class Evaluation:
    """A sized iterable of one batch: one whole trial in each environment, from fixed seeds, training left untouched.

    Args:
        env: batched environment of its own.
        policy: the policy to evaluate.
        seed: of the tasks, and of the actions where they are drawn.
        deterministic: take the most likely action rather than draw one.
    """

    def __init__(self, env: TrialEnv, policy: TensorDictModuleBase, seed: int, *, deterministic: bool) -> None:
        self.env, self.policy, self.seed, self.deterministic = env, policy, seed, deterministic

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[TensorDict]:
        mode = ExplorationType.DETERMINISTIC if self.deterministic else ExplorationType.RANDOM
        device = self.env.device
        devices = [device] if device is not None and device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad(), set_exploration_type(mode):
            torch.manual_seed(self.seed)
            self.env.set_seed(self.seed)
            batch = self.env.rollout(self.env.horizon, self.policy, break_when_any_done=False)
        batch.batch_size = batch.batch_size[:1]
        yield cast(TensorDict, batch)
