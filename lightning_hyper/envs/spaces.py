"""The sizes that an environment hands to the networks, so that no recipe types one."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchrl.data import Bounded, Categorical, MultiCategorical

from lightning_hyper.checks import RecipeError
from lightning_hyper.envs.base import BatchedEnv


@dataclass(frozen=True)
class Spaces:
    """Sizes of an environment, read from its specs alone.

    Attributes:
        observation: shape of one observation, a vector or an image.
        actions: number of discrete actions, or dimensions of a real one.
        discrete: whether actions are an index.
        low, high: bounds of each dimension of a real action; empty where it has none.
        horizon: frames from a reset to `done` at the latest.
        trials: whether the environment steps trials, and so shows where their episodes end.
        task: features of `task` where it is a vector; 0 where it is not.
        tasks: name of each task where `task` is an index.
        missions: for each task the texts that its episodes are about; `mission` counts through all of them in order.
        raw: plain description of the spaces that the environment itself has, for an agent outside of training.
    """

    observation: tuple[int, ...]
    actions: int
    discrete: bool
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    horizon: int = 1_000
    trials: bool = False
    task: int = 0
    tasks: tuple[str, ...] = ()
    missions: tuple[tuple[str, ...], ...] = ()
    raw: Any = None

    @classmethod
    def of(cls, env: BatchedEnv) -> Spaces:
        """Read them from the specs of a batched environment.

        Raises:
            RecipeError: the action is neither an index (`Categorical` spec) nor one real vector.
        """
        action, shown = env.action_spec, env.observation_spec
        bounds: dict[str, tuple[float, ...]] = {}
        if isinstance(action, Categorical) and not isinstance(action, MultiCategorical):
            actions, discrete = int(action.space.n), True
        elif action.dtype.is_floating_point:
            actions, discrete = action.shape[-1], False
            if isinstance(action, Bounded):
                ends = {"low": action.space.low, "high": action.space.high}
                bounds = {key: tuple(end.reshape(-1, actions)[0].tolist()) for key, end in ends.items()}
        else:
            raise RecipeError(
                f"data.env: {type(env).__name__} has action spec {action}; it must be Categorical (an index) or a "
                "real vector"
            )
        keys = shown.keys()
        task = shown["task"] if "task" in keys else None
        indexed = isinstance(task, Categorical)
        return cls(
            observation=tuple(shown["observation"].shape[len(env.batch_size) :]),
            actions=actions,
            discrete=discrete,
            horizon=env.horizon,
            trials="episode_done" in keys,
            task=0 if task is None or indexed else task.shape[-1],
            tasks=tuple(env.tasks) if indexed else (),
            missions=tuple(tuple(texts) for texts in env.missions),
            raw=env.raw,
            **bounds,
        )

    @property
    def features(self) -> int:
        """Numbers in one observation."""
        return math.prod(self.observation)

    @property
    def is_image(self) -> bool:
        """Whether an observation is an image rather than a vector."""
        return len(self.observation) > 1

    def action_features(self, action: Tensor) -> Tensor:
        """Action as real features `[..., actions]`: one-hot where it is an index."""
        return F.one_hot(action, self.actions).to(torch.float32) if self.discrete else action

    def asdict(self) -> dict[str, Any]:
        return asdict(self)

    def fits(self, other: Spaces) -> bool:
        """Whether networks made for one serve the other: all but the horizon and the raw spaces are equal."""
        mine, theirs = self.asdict(), other.asdict()
        return all(mine[key] == theirs[key] for key in mine if key not in ("horizon", "raw"))
