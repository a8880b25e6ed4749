"""On-policy experience: one batch is what the policy, as it is now, does for some frames."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensordict import TensorDict

from lightning_hyper.checks import Count, RecipeError, checked, require_memory
from lightning_hyper.envs import BatchedEnv
from lightning_hyper.envs.gym import NO_LIMIT
from lightning_hyper.experience.base import Experience
from lightning_hyper.experience.collection import Collection


class Rollouts(Experience[TensorDict]):
    """Collects `steps` frames from each environment per batch, as `Collection` lays them out.

    Args:
        env: makes the environment; its size `num_envs` is that of each rank.
        steps: frames of each environment in a batch; null for the longest episode, or in trials one whole trial.
        options: as in `Experience`.
    """

    @checked
    def __init__(self, env: Callable[[], BatchedEnv], *, steps: Count | None = 128, **options: Any) -> None:
        super().__init__(env, **options)
        self._steps = steps

    @property
    def steps(self) -> int:
        """Frames of each environment in a batch."""
        return self._steps or self.env.horizon

    def begin(self, policy: Any, *, folder: Path | None = None, budget: int | None = None) -> None:
        if self._steps is None and self.env.horizon >= NO_LIMIT:
            raise RecipeError("data.steps is null, but data.env has no limit of frames; give a number, such as 128")
        batch = self.env.batch_size.numel() * self.steps
        require_memory("data.env.num_envs times data.steps", 2 * batch * self.env.frame_bytes)
        keep = getattr(policy, "keep_states", False)
        self.collection = Collection(self.env, policy, self.steps, value=policy.value_of, keep_states=keep)

    def collect(self) -> TensorDict:
        assert self.collection is not None
        return self.collection.collect()
