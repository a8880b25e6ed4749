"""MiniGrid's own package: its tasks, their levels, and an engine that steps its environments one by one."""

from __future__ import annotations

import difflib
import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import gymnasium
import minigrid  # noqa: F401  its import registers the tasks with gymnasium
import numpy as np
import torch
from gymnasium.spaces import Dict, Discrete
from minigrid.core.mission import MissionSpace
from minigrid.minigrid_env import MiniGridEnv
from torch import Tensor

from lightning_hyper.checks import RecipeError

VIEW, ACTIONS = 7, 7


@dataclass(frozen=True)
class Task:
    """What is known of a task before any of its episodes.

    Args:
        id: name under which the package registers it.
        max_steps: frames after which an episode is truncated.
        missions: every text that an episode may be about.
    """

    id: str
    max_steps: int
    missions: tuple[str, ...]

    def make(self) -> MiniGridEnv:
        """A fresh environment of the package, without gymnasium's wrappers."""
        return _make(self.id)


def _make(task: str) -> MiniGridEnv:
    with warnings.catch_warnings():
        # Gymnasium warns of ids with a newer version; which one to train on is the recipe's choice.
        warnings.simplefilter("ignore")
        return cast(MiniGridEnv, gymnasium.make(task, disable_env_checker=True).unwrapped)


@cache
def describe(task: str) -> Task:
    """Look a task up in the package.

    Raises:
        RecipeError: no such id, or observations, actions or missions that differ from those of the others.
    """
    known = [name for name in gymnasium.registry if name.startswith(("MiniGrid-", "BabyAI-"))]
    if task not in known:
        close = difflib.get_close_matches(task, known, 3, 0.4)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise RecipeError(f"data.env.tasks: {task!r} is no id of the minigrid package{hint}")
    try:
        env = _make(task)
        # Some find out only here what they lack.
        begin(env, 0)
    except Exception as error:
        why = " ".join(str(error).split())
        if "-WFC-" in task:
            why = "its levels need patterns and packages, for wave function collapse, that are not installed"
        raise RecipeError(f"data.env.tasks: the minigrid package cannot make {task}: {why}") from error
    missions = cast(Dict, env.observation_space)["mission"]
    # A subclass stands for texts that are made as the level is.
    if type(missions) is not MissionSpace:
        raise RecipeError(
            f"data.env.tasks: {task} makes its missions up with its levels, so they cannot be listed beforehand; give "
            "ids that start with MiniGrid-"
        )
    size, actions = env.agent_view_size, int(cast(Discrete, env.action_space).n)
    if (size, actions) != (VIEW, ACTIONS):
        raise RecipeError(
            f"data.env.tasks: {task} has a view of {size}x{size} cells and {actions} actions; all tasks must have "
            f"{VIEW}x{VIEW} cells and {ACTIONS} actions"
        )
    texts = itertools.product(*(missions.ordered_placeholders or []))
    return Task(task, int(env.max_steps), tuple(dict.fromkeys(missions.mission_func(*words) for words in texts)))


def level_seed(seed: int, level: int) -> int:
    """Seed of the package's reset that makes a level of an environment with this seed."""
    return ((seed % 2**64) << 32) + level


def begin(env: MiniGridEnv, seed: int) -> np.ndarray:
    """Start the level with this seed and give its first image `[7, 7, 3]`."""
    try:
        observation = env.reset(seed=seed)[0]
    except RecursionError:
        observation = None
    # Some levels find no room for their objects: the next from the same stream takes their place.
    while observation is None:
        try:
            observation = env.reset()[0]
        except RecursionError:
            continue
    return cast(np.ndarray, observation["image"])


class Engine(ABC):
    """Steps episodes of mixed tasks side by side.

    Args:
        tasks: the tasks.
        task: which of them each environment has, `[num_envs]`, on the CPU.

    Attributes:
        seed: with the number of a level, what the level is made from.
        image: what each agent sees, `[num_envs, 7, 7, 3]`, uint8, as the package encodes it.
        direction: where each agent looks, `[num_envs]`: right, down, left, up.
        mission: index into the missions of all tasks, `[num_envs]`.
        steps: frames since the start, `[num_envs]`.
    """

    seed: int
    image: Tensor
    direction: Tensor
    mission: Tensor
    steps: Tensor

    def __init__(self, tasks: Sequence[Task], task: Tensor) -> None:
        self.tasks, self.task, self.num_envs, self.seed = tuple(tasks), task, len(task), 0
        texts = itertools.count()
        self.texts = [{text: next(texts) for text in task.missions} for task in self.tasks]

    def mission_index(self, task: int, env: MiniGridEnv) -> int:
        """Index of the mission that an environment of the package is on."""
        try:
            return self.texts[task][env.mission]
        except KeyError:
            raise RecipeError(
                f"data.env.tasks: {self.tasks[task].id} gave the mission {env.mission!r}, which its mission space lacks"
            ) from None

    @abstractmethod
    def start(self, rows: Tensor, levels: Tensor) -> None:
        """Start a level in each environment of `rows`; both `[K]`, on the CPU."""

    @abstractmethod
    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One frame of all: reward (float32), terminated and truncated, each `[num_envs]`."""

    @abstractmethod
    def save_state(self) -> dict[str, Tensor]:
        """What exact continuation needs."""

    @abstractmethod
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `save_state`."""


class PackageEngine(Engine):
    """The package's environments in a loop; see `Engine` for arguments. Its tensors live on the CPU."""

    def __init__(self, tasks: Sequence[Task], task: Tensor) -> None:
        super().__init__(tasks, task)
        num_envs = self.num_envs
        self.envs = [self.tasks[k].make() for k in task.tolist()]
        self.image = torch.zeros(num_envs, VIEW, VIEW, 3, dtype=torch.uint8)
        self.direction, self.mission, self.steps = torch.zeros(3, num_envs, dtype=torch.int64).unbind(0)
        self._levels = [0] * num_envs
        self._actions = [bytearray() for _ in range(num_envs)]

    def start(self, rows: Tensor, levels: Tensor) -> None:
        # New tensors, since the former ones have been given away.
        self.image, self.direction = self.image.clone(), self.direction.clone()
        self.mission, self.steps = self.mission.clone(), self.steps.clone()
        for i, level in zip(rows.tolist(), levels.tolist(), strict=True):
            env = self.envs[i]
            self.image[i] = torch.from_numpy(begin(env, level_seed(self.seed, level)))
            self.direction[i] = int(env.agent_dir)
            self.mission[i] = self.mission_index(int(self.task[i]), env)
            self.steps[i] = 0
            self._levels[i] = level
            self._actions[i].clear()

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images: list[np.ndarray] = []
        rewards: list[float] = []
        ends: list[tuple[bool, bool]] = []
        for env, chosen, past in zip(self.envs, action.tolist(), self._actions, strict=True):
            observation, reward, *end, _ = env.step(chosen)
            past.append(chosen)
            images.append(observation["image"])
            rewards.append(float(reward))
            ends.append((bool(end[0]), bool(end[1])))
        self.image = torch.from_numpy(np.stack(images))
        self.direction = torch.tensor([int(env.agent_dir) for env in self.envs])
        self.steps = self.steps + 1
        terminated, truncated = torch.tensor(ends).unbind(1)
        return torch.tensor(rewards, dtype=torch.float32), terminated, truncated

    def save_state(self) -> dict[str, Tensor]:
        longest = max(map(len, self._actions))
        padded = b"".join(bytes(past).ljust(longest, b"\0") for past in self._actions)
        actions = torch.tensor(list(padded), dtype=torch.uint8).view(self.num_envs, longest)
        return {"level": torch.tensor(self._levels), "step_count": self.steps.clone(), "actions": actions}

    def load_state(self, state: dict[str, Tensor]) -> None:
        # The package cannot write an episode down, so each is played again up to where it was.
        self.start(torch.arange(self.num_envs), state["level"].cpu())
        self.steps = state["step_count"].cpu().clone()
        for i, (env, count) in enumerate(zip(self.envs, self.steps.tolist(), strict=True)):
            for action in state["actions"][i, :count].tolist():
                observation = env.step(action)[0]
                self._actions[i].append(action)
                self.image[i] = torch.from_numpy(observation["image"])
                self.direction[i] = int(env.agent_dir)
