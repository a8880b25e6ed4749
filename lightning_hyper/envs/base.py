"""What the environments share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase


class BatchedEnv(EnvBase):
    """A batch of episodes side by side, whose randomness comes from one generator of its own.

    Args:
        num_envs: episodes stepped side by side.
        device: where the tensors live.

    Attributes:
        horizon: frames from a reset to `done` at the latest.
        generator: draws what a reset leaves to chance.
    """

    batch_locked = True
    horizon: int

    def __new__(cls, *args: Any, **kwargs: Any) -> BatchedEnv:
        # TorchRL binds its own `__new__` to each class, behind which jsonargparse does not find the constructor.
        made: BatchedEnv = super().__new__(cls)
        return made

    def __init__(self, num_envs: int, device: str) -> None:
        if num_envs < 1:
            raise ValueError(f"{type(self).__name__}: num_envs is {num_envs}; it must be at least 1")
        super().__init__(device=torch.device(device), batch_size=torch.Size([num_envs]))
        self.generator = torch.Generator(device=self.device)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.generator.manual_seed(seed)

    def save_state(self) -> dict[str, Tensor]:
        """What exact continuation needs besides the tensordict of the last step."""
        return {"generator": self.generator.get_state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `save_state`."""
        self.generator.set_state(state["generator"].cpu())


class TrialEnv(BatchedEnv):
    """A batch of trials side by side: several episodes of one task, with `done` only at the end of the last.

    The entries of its tensordicts head `lightning_hyper.envs`.
    """


class EpisodeEnv(BatchedEnv):
    """A batch of episodes with continuous actions and a limit of frames; its entries head `lightning_hyper.envs`."""

    def __init__(self, num_envs: int, episode_steps: int, device: str) -> None:
        if episode_steps < 1:
            raise ValueError(f"{type(self).__name__}: episode_steps is {episode_steps}; it must be at least 1")
        super().__init__(num_envs, device)
        self.horizon = episode_steps

    def _make_specs(self, features: int, low: Tensor, high: Tensor) -> None:
        """`low` and `high` `[actions]`, in the environment's own units."""
        n = self.batch_size[0]

        def real(width: int) -> Unbounded:
            return Unbounded((n, width), device=self.device, dtype=torch.float32)

        def flag() -> Binary:
            return Binary(1, (n, 1), device=self.device, dtype=torch.bool)

        bounds = (edge.to(self.device, torch.float32).expand(n, -1) for edge in (low, high))
        self.action_spec = Bounded(*bounds, shape=(n, len(low)), device=self.device, dtype=torch.float32)
        self.reward_spec = real(1)
        self.full_done_spec = Composite(done=flag(), terminated=flag(), truncated=flag(), shape=(n,))
        self.observation_spec = Composite(
            observation=real(features),
            is_init=flag(),
            step_count=Unbounded((n, 1), device=self.device, dtype=torch.int64),
            episode_return=real(1),
            shape=(n,),
        )
