"""The sizes that an environment hands to the networks, so that no recipe types one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchrl.data import Categorical
from torchrl.envs import EnvBase


@dataclass(frozen=True)
class Spaces:
    """Sizes of an environment: features of observation and task, and the action space.

    Attributes:
        observation: features of `observation`.
        task: features of `task`.
        actions: number of discrete actions, or dimensions of a continuous one.
        discrete: whether actions are an index.
    """

    observation: int
    task: int
    actions: int
    discrete: bool

    @classmethod
    def of(cls, env: EnvBase) -> Spaces:
        """Read them from the specs of a batched environment.

        Raises:
            ValueError: the action is neither an index (`Categorical` spec) nor one real vector.
        """
        action = env.action_spec
        if isinstance(action, Categorical):
            actions, discrete = int(action.space.n), True
        elif action.dtype.is_floating_point:
            actions, discrete = action.shape[-1], False
        else:
            raise ValueError(
                f"data.env: {type(env).__name__} has action spec {action}; it must be Categorical (an index) or a "
                "real vector"
            )
        sizes = {key: env.observation_spec[key].shape[-1] for key in ("observation", "task")}
        return cls(actions=actions, discrete=discrete, **sizes)

    def action_features(self, action: Tensor) -> Tensor:
        """Action as real features `[..., actions]`: one-hot where it is an index."""
        return F.one_hot(action, self.actions).to(torch.float32) if self.discrete else action

    def asdict(self) -> dict[str, Any]:
        return asdict(self)
