"""Any Gymnasium environment, several copies side by side."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from gymnasium import Env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray
from torch import Tensor

from lightning_hyper.checks import Copies, RecipeError, checked
from lightning_hyper.envs.base import BatchedEnv
from lightning_hyper.envs.gym_make import Maker
from lightning_hyper.envs.gym_spaces import choices, describe, observation_shape, shown, to_action, to_observation
from lightning_hyper.envs.gym_state import can_be_restored, restore, snapshot
from lightning_hyper.envs.gym_tasks import Listed, Sampled, Tasks

# Frames of an episode that has no limit of its own.
NO_LIMIT = 1_000_000


class Gym(BatchedEnv):
    """A batch of episodes of any Gymnasium environment, whose time limit truncates.

    Observations are vectors, float32: Box, Discrete, MultiBinary and MultiDiscrete, alone or nested in Dict and Tuple,
    flattened as `gymnasium.spaces.flatten` does, an index as one-hot. A single Box of at least two dimensions is an
    image, which keeps its shape and its kind of number. Actions are Discrete, or Box with bounds, to which they are
    clipped. Each reset gets a seed of its own.

    It has tasks where `tasks` lists them, or where the environment has `sample_tasks(count)` and `set_task(task)`, as
    those of Meta-World and learn2learn do; each new episode draws one. `task` is an index in the first case; in the
    second it is the task's numbers, and is missing where it has none.

    Args:
        id: gymnasium's name of the environment; `module:id` imports the module that registers it.
        num_envs: copies stepped side by side.
        arguments: keyword arguments of `gymnasium.make`, such as `max_episode_steps` or the environment's own.
        wrappers: class paths of wrappers, or `class_path` with `init_args`, from the innermost outwards.
        tasks: one task each: further keyword arguments of `gymnasium.make`.
        asynchronous: step each copy in a process of its own.
        render: be ready to make pictures.
        device: where the tensors live; the copies are stepped on the CPU.

    Attributes:
        horizon: frames of the time limit, 1,000,000 where there is none.
        vec: gymnasium's vector environment.

    Raises:
        RecipeError: an environment that cannot be made, or has observations or actions of another kind.

    Source: Towers et al. 2024 (arXiv 2407.17032).
    """

    @checked
    def __init__(
        self,
        id: str,  # noqa: A002  gymnasium's own word
        num_envs: Copies = 1,
        *,
        arguments: dict[str, Any] | None = None,
        wrappers: Sequence[str | dict[str, Any]] = (),
        tasks: Sequence[dict[str, Any]] | None = None,
        asynchronous: bool = False,
        render: bool = False,
        device: str = "cpu",
    ) -> None:
        options: dict[str, Any] = {"arguments": arguments, "wrappers": wrappers, "tasks": tasks, "device": device}
        make = Maker(id, arguments or {}, wrappers, render)
        listed = Listed(make, tasks, num_envs) if tasks is not None else None
        probe = listed.take(0) if listed else make()
        sampled = None if listed else Sampled.of(probe, make, num_envs)
        if asynchronous and (listed or sampled):
            probe.close()
            raise RecipeError(f"data.env.asynchronous is true, but Gym({id!r}) has tasks, which need it to be false")
        action = _checked(id, probe)
        super().__init__(num_envs, device)
        # The copies do not depend on the device.
        self.generator = torch.Generator()
        self._id, self._make, self._asynchronous = id, make, asynchronous
        self._made_to_be_seen = partial(Gym, id, num_envs, asynchronous=asynchronous, render=True, **options)
        self._space, self._action_space = probe.observation_space, probe.action_space
        self.raw = {"observation": describe(self._space), "action": describe(self._action_space)}
        limit = probe.spec.max_episode_steps if probe.spec else None
        self.horizon = limit if limit and limit > 0 else NO_LIMIT
        fps = probe.metadata.get("render_fps")
        self.seconds = 1 / fps if fps else None
        self.vec: Any
        if asynchronous:
            probe.close()
            # TorchRL changes the default to one whose processes run the main script and import torch, each of them.
            context = "fork" if sys.platform == "linux" else None
            made = [make] * num_envs
            self.vec = AsyncVectorEnv(made, copy=False, context=context, autoreset_mode=AutoresetMode.DISABLED)
        else:
            others = [partial(listed.take, 0) if listed else make] * (num_envs - 1)
            self.vec = SyncVectorEnv([lambda: probe, *others], copy=False, autoreset_mode=AutoresetMode.DISABLED)
        self._choice: Tasks | None = listed or sampled
        self.tasks = listed.names if listed else ()
        self._ends = np.zeros((2, num_envs), dtype=np.bool_)
        self._value: NDArray[Any] | None = None
        shape, dtype = observation_shape(self._space)
        self._make_specs(shape, action, dtype=dtype, task_features=sampled.features if sampled else 0)
        self.has_tasks = self._choice is not None

    def draw_tasks(self, rows: Tensor) -> None:
        if self._choice is not None:
            self._choice.draw(rows.cpu(), self.generator, self.vec.envs)

    def start(self, rows: Tensor) -> None:
        mask = rows.cpu().numpy()
        # For all, so that what one environment draws does not depend on how many others begin with it.
        seeds = torch.randint(2**31 - 1, mask.shape, generator=self.generator).tolist()
        if not mask.any():
            return
        value, _ = self.vec.reset(seed=seeds, options=None if mask.all() else {"reset_mask": mask})
        self._ends[:, mask] = False
        self._value = to_observation(self._space, value, batched=True)

    def observation(self) -> Tensor:
        return torch.from_numpy(self._value).to(self.device)

    def simulate(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Gymnasium's are not stepped beyond their end.
        if (over := self._ends.any(0)).any():
            self.start(torch.from_numpy(over))
        taken = to_action(self._action_space, action.detach().cpu().numpy())
        value, reward, terminated, truncated, _ = self.vec.step(taken)
        self._ends = np.stack((terminated, truncated))
        self._value = to_observation(self._space, value, batched=True)
        return (
            self.observation(),
            torch.from_numpy(reward.astype(np.float32)).to(self.device),
            torch.from_numpy(self._ends[0].copy()).to(self.device),
        )

    def truncated(self, step_count: Tensor) -> Tensor:
        cut = torch.from_numpy(self._ends[1]).to(self.device)
        return cut.unsqueeze(1) | (step_count >= self.horizon)

    def entries(self) -> dict[str, Tensor]:
        task = None if self._choice is None else self._choice.shown()
        return {} if task is None else {"task": task.to(self.device)}

    def render(self) -> NDArray[Any] | None:
        if self.vec.render_mode != "rgb_array":
            return None
        picture: NDArray[Any] = self.vec.render()[0] if self._asynchronous else self.vec.envs[0].render()
        return picture

    def filmed(self) -> BatchedEnv:
        if self.vec.render_mode == "rgb_array" or "rgb_array" not in self.vec.metadata.get("render_modes", ()):
            return self
        self.close()
        seen: BatchedEnv = self._made_to_be_seen()
        return seen

    @cached_property
    def why_not_exact(self) -> str:  # type: ignore[override]
        if self._asynchronous:
            return f"Gym({self._id!r}) runs in processes of its own, so that a resumed run begins new episodes"
        choice = self._choice
        if not (choice.plain and can_be_restored(choice.example) if choice else can_be_restored(self._make)):
            return f"Gym({self._id!r}) has state that is not plain data, so that a resumed run begins new episodes"
        return ""

    def snapshot(self) -> dict[str, Any]:
        state = {"envs": [snapshot(env) for env in self.vec.envs], "ends": torch.from_numpy(self._ends.copy())}
        return state if self._choice is None else state | {"tasks": self._choice.save()}

    def restore(self, state: Mapping[str, Any]) -> None:
        if self._choice is not None:
            self._choice.load(state["tasks"], self.vec.envs)
        # Gymnasium keeps account of which are over; ours takes its place.
        self.vec.reset(seed=0)
        for env, kept in zip(self.vec.envs, state["envs"], strict=True):
            restore(env, kept)
        self._ends = state["ends"].cpu().numpy().copy()

    def close(self, *, raise_if_closed: bool = True) -> None:
        self.vec.close()
        if self._choice is not None:
            self._choice.close()
        super().close(raise_if_closed=raise_if_closed)


def _checked(name: str, env: Env[Any, Any]) -> int | tuple[Tensor, Tensor]:
    """The choice of actions, once both spaces are known to be supported."""
    if not shown(env.observation_space):
        raise RecipeError(
            f"data.env: Gym({name!r}) has observation space {env.observation_space}; supported are Box, Discrete, "
            "MultiBinary and MultiDiscrete, and Dict and Tuple of these (data.env.wrappers may leave parts out)"
        )
    action = choices(env.action_space)
    if action is None:
        raise RecipeError(
            f"data.env: Gym({name!r}) has action space {env.action_space}; supported are Discrete, and Box with "
            "bounds that are finite and lie apart"
        )
    return action
