"""On-policy experience: one Lightning batch is one collected batch, collected when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase

from lightning_hyper.envs import BatchedEnv, TrialEnv
from lightning_hyper.experience.base import Collection, Experience


class EpisodeRollouts(Experience):
    """Collects `steps` frames from each environment per batch, with the module's own policy.

    A batch is a TensorDict `[num_envs]` with entries `[num_envs, time, ...]`: what the environment shows, what the
    policy wrote, and under `next` what followed. Nothing is collected ahead: the next batch is made by the policy as
    the last one left it.

    Args:
        env: makes the environment; its size `num_envs` is that of each rank.
        steps: frames of each environment in a batch; null for as many as its longest episode has.
    """

    def __init__(self, env: Callable[[], BatchedEnv], *, steps: int | None = 128, **options: Any) -> None:
        super().__init__(env, **options)
        if steps is not None and steps < 1:
            raise ValueError(f"data.steps is {steps}; it must be at least 1")
        self._steps = steps

    @property
    def steps(self) -> int:
        """Frames of each environment in a batch."""
        return self._steps or self.env.horizon

    def begin(self, restored: dict[str, Any] | None) -> Rollouts:
        rollouts = Rollouts(self.env, self.policy, self.steps, self.batches_per_epoch)
        if restored is not None:
            rollouts.load_state_dict(restored)
        return rollouts


class TrialRollouts(EpisodeRollouts):
    """Collects from each of the environment's trials, several episodes of one task.

    In a batch, `hidden` `[num_envs, state_features]` is the policy's state before the window, `next, hidden` its state
    after each step; it crosses batches. An evaluation is one whole trial in each environment.

    Args:
        env: makes the environment; its size `num_envs` is that of each rank.
        steps: frames of each environment in a batch; null for one whole trial.
    """

    def __init__(self, env: Callable[[], BatchedEnv], *, steps: int | None = None, **options: Any) -> None:
        super().__init__(env, steps=steps, **options)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if not isinstance(self.env, TrialEnv):
            raise ValueError(
                f"data.env: {type(self.env).__name__} has no trials; TrialRollouts takes environments of many tasks, "
                "such as GridNavi"
            )

    def evaluate(self) -> TensorDict:
        return whole_trials(self.eval_env, self.policy)


class Rollouts(Collection):
    """A sized iterable of collected batches (an unsized one would be read one batch ahead).

    Args:
        env: batched environment.
        policy: reads and writes one step, `[num_envs, ...]`.
        steps: frames of each environment in a batch.
        batches: length of one pass.
    """

    def __init__(self, env: BatchedEnv, policy: TensorDictModuleBase, steps: int, batches: int) -> None:
        super().__init__(env, policy, steps)
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[TensorDict]:
        for _ in range(self.batches):
            yield self.collect()

    def collect(self) -> TensorDict:
        """One batch, by the policy as it is now."""
        before = self.carried.get("hidden", None)
        batch = super().collect()
        after = batch.pop("hidden", None)
        batch.batch_size = batch.batch_size[:1]
        if after is not None:
            batch["next", "hidden"] = after
            batch["hidden"] = torch.zeros_like(after[:, 0]) if before is None else before
        return batch


def whole_trials(env: BatchedEnv, policy: TensorDictModuleBase) -> TensorDict:
    """One whole trial in each environment, entries `[num_envs, time, ...]`."""
    batch = cast(TensorDict, env.rollout(env.horizon, policy, break_when_any_done=False))
    batch.batch_size = batch.batch_size[:1]
    return batch
