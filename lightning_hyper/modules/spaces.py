"""The sizes that an environment hands to the networks, so that no recipe types one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchrl.data import Bounded, Categorical
from torchrl.envs import EnvBase


@dataclass(frozen=True)
class Spaces:
    """Sizes of an environment: features of observation and task, and the action space.

    Attributes:
        observation: features of `observation`, all of an image's.
        task: features of `task`, or how many tasks there are where it is an index; 0 where there is none.
        actions: number of discrete actions, or dimensions of a continuous one.
        discrete: whether actions are an index.
        low, high: bounds of each dimension of a continuous action; empty where it has none.
        image: shape of an observation that is no vector; empty where it is one.
        tasks: name of each task where `task` is an index.
        missions: for each task the texts that its episodes are about; `mission` counts through all of them in order.
    """

    observation: int
    task: int
    actions: int
    discrete: bool
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    image: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()
    missions: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def of(cls, env: EnvBase) -> Spaces:
        """Read them from the specs of a batched environment.

        Raises:
            ValueError: the action is neither an index (`Categorical` spec) nor one real vector.
        """
        action = env.action_spec
        bounds: dict[str, tuple[float, ...]] = {}
        if isinstance(action, Categorical):
            actions, discrete = int(action.space.n), True
        elif action.dtype.is_floating_point:
            actions, discrete = action.shape[-1], False
            if isinstance(action, Bounded):
                ends = {"low": action.space.low, "high": action.space.high}
                bounds = {key: tuple(end.reshape(-1, actions)[0].tolist()) for key, end in ends.items()}
        else:
            raise ValueError(
                f"data.env: {type(env).__name__} has action spec {action}; it must be Categorical (an index) or a "
                "real vector"
            )
        task = env.observation_spec["task"] if "task" in env.observation_spec.keys() else None  # noqa: SIM118
        shape = env.observation_spec["observation"].shape[len(env.batch_size) :]
        return cls(
            observation=shape.numel(),
            task=0 if task is None else int(task.space.n) if isinstance(task, Categorical) else task.shape[-1],
            actions=actions,
            discrete=discrete,
            image=tuple(shape) if len(shape) > 1 else (),
            tasks=tuple(getattr(env, "tasks", ())),
            missions=tuple(getattr(env, "missions", ())),
            **bounds,
        )

    def action_features(self, action: Tensor) -> Tensor:
        """Action as real features `[..., actions]`: one-hot where it is an index."""
        return F.one_hot(action, self.actions).to(torch.float32) if self.discrete else action

    def asdict(self) -> dict[str, Any]:
        return asdict(self)
