"""What the native environments share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchrl.envs import EnvBase


class TrialEnv(EnvBase):
    """A batch of trials side by side, whose randomness comes from one generator of its own.

    Args:
        num_envs: trials stepped side by side.
        device: where the tensors live.

    Attributes:
        trial_steps: steps (frames) of a whole trial.
        generator: draws the tasks.
    """

    batch_locked = True
    trial_steps: int

    def __new__(cls, *args: Any, **kwargs: Any) -> TrialEnv:
        # TorchRL binds its own `__new__` to each class, behind which jsonargparse does not find the constructor.
        made: TrialEnv = super().__new__(cls)
        return made

    def __init__(self, num_envs: int, device: str) -> None:
        if num_envs < 1:
            raise ValueError(f"{type(self).__name__}: num_envs is {num_envs}; it must be at least 1")
        super().__init__(device=torch.device(device), batch_size=torch.Size([num_envs]))
        self.generator = torch.Generator(device=self.device)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.generator.manual_seed(seed)

    def get_extra_state(self) -> Tensor:
        """State of the generator; everything else is in the tensordict."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state.cpu())
