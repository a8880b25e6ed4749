"""Tasks of a Gymnasium environment: arguments listed in a recipe, or drawn by the environment itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gymnasium import Env
from torch import Tensor

from lightning_hyper.checks import RecipeError
from lightning_hyper.envs.gym_make import Maker
from lightning_hyper.envs.gym_spaces import observation_shape
from lightning_hyper.envs.gym_state import ForeignError, pack, seeded, unpack

# Letters of a task's name.
LONGEST = 40


class Tasks(ABC):
    """Which task each of several environments has.

    Attributes:
        plain: whether the tasks are plain data, so that they can be saved.
    """

    plain = True

    @abstractmethod
    def draw(self, rows: Tensor, generator: torch.Generator, envs: list[Env[Any, Any]]) -> None:
        """Draw the tasks of `rows`, bool `[num_envs]`, and give them to the environments."""

    @abstractmethod
    def shown(self) -> Tensor | None:
        """What `task` shows, `[num_envs]` or `[num_envs, features]`."""

    @abstractmethod
    def example(self) -> Env[Any, Any]:
        """A fresh environment that has one of the tasks."""

    @abstractmethod
    def save(self) -> Any:
        """The tasks as tensors and plain data."""

    @abstractmethod
    def load(self, state: Any, envs: list[Env[Any, Any]]) -> None:
        """Give the environments the tasks that were saved."""

    @abstractmethod
    def close(self) -> None:
        """Close environments that wait to be used."""


class Listed(Tasks):
    """Tasks that are arguments of `gymnasium.make`, each with environments of its own that are used again.

    Args:
        make: makes the environment without the tasks' arguments.
        tasks: arguments of each task.
        num_envs: environments that have one at a time.

    Raises:
        RecipeError: tasks that are none, the same, or differ in their spaces.
    """

    def __init__(self, make: Maker, tasks: Sequence[Mapping[str, Any]], num_envs: int) -> None:
        if not tasks or any(task in tasks[:i] for i, task in enumerate(tasks)):
            raise RecipeError(
                f"data.env.tasks is {list(tasks)}; it must list at least one task's arguments, and none of them twice"
            )
        names = [_name(task) for task in tasks]
        self.names = tuple(
            name if len(name) <= LONGEST and names.count(name) == 1 else f"task {i}" for i, name in enumerate(names)
        )
        self._makers = [replace(make, arguments={**make.arguments, **task}) for task in tasks]
        self._index = torch.zeros(num_envs, dtype=torch.int64)
        self._idle = [[maker()] for maker in self._makers]
        first = self._idle[0][0]
        for name, (env,) in zip(self.names, self._idle, strict=True):
            seen = [observation_shape(one.observation_space) for one in (env, first)]
            if seen[0] != seen[1] or env.action_space != first.action_space:
                raise RecipeError(
                    f"data.env.tasks: the task {name!r} has observation space {env.observation_space} and action space "
                    f"{env.action_space}; all must have those of the first, {first.observation_space} and "
                    f"{first.action_space}"
                )

    def take(self, task: int) -> Env[Any, Any]:
        """An environment of this task that nobody uses."""
        return self._idle[task].pop() if self._idle[task] else self._makers[task]()

    def draw(self, rows: Tensor, generator: torch.Generator, envs: list[Env[Any, Any]]) -> None:
        drawn = torch.randint(len(self.names), rows.shape, generator=generator)
        self._change(torch.where(rows, drawn, self._index), envs)

    def _change(self, index: Tensor, envs: list[Env[Any, Any]]) -> None:
        changed = (index != self._index).nonzero().squeeze(1).tolist()
        for i in changed:
            self._idle[int(self._index[i])].append(envs[i])
        for i in changed:
            envs[i] = self.take(int(index[i]))
        self._index = index

    def shown(self) -> Tensor:
        return self._index

    def example(self) -> Env[Any, Any]:
        return self._makers[0]()

    def save(self) -> Tensor:
        return self._index.clone()

    def load(self, state: Any, envs: list[Env[Any, Any]]) -> None:
        self._change(state.cpu().clone(), envs)

    def close(self) -> None:
        for env in (env for idle in self._idle for env in idle):
            env.close()


class Sampled(Tasks):
    """Tasks that the environment draws by `sample_tasks(count)` and takes by `set_task(task)`.

    Args:
        sampler: an environment that draws the tasks and is not stepped.
        make: makes the environment.
        num_envs: environments that have one at a time.

    Attributes:
        features: numbers that a task consists of; 0 where it consists of other things.
    """

    def __init__(self, sampler: Env[Any, Any], make: Maker, num_envs: int) -> None:
        self._sampler, self._make = sampler, make
        first = self._sample(1, 0)[0]
        self._tasks = [first] * num_envs
        numbers = _numbers(first)
        self.features = len(numbers) if numbers else 0
        self._shown = torch.zeros(num_envs, self.features)
        try:
            pack(first)
        except ForeignError:
            self.plain = False

    @classmethod
    def of(cls, env: Env[Any, Any], make: Maker, num_envs: int) -> Sampled | None:
        """For environments like this one, if they have such tasks."""
        has = all(callable(getattr(env.unwrapped, name, None)) for name in ("sample_tasks", "set_task"))
        return cls(make(), make, num_envs) if has else None

    def _sample(self, count: int, seed: int) -> list[Any]:
        # Which generator the environment draws from is its own affair: one of its own or a global one.
        env: Any = self._sampler.unwrapped
        env.np_random = np.random.default_rng(seed)
        with seeded(seed):
            return list(env.sample_tasks(count))

    def draw(self, rows: Tensor, generator: torch.Generator, envs: list[Env[Any, Any]]) -> None:
        chosen = rows.nonzero().squeeze(1).tolist()
        seed = int(torch.randint(2**31 - 1, (), generator=generator))
        if chosen:
            for i, task in zip(chosen, self._sample(len(chosen), seed), strict=True):
                self._set(i, task, envs)

    def _set(self, i: int, task: Any, envs: list[Env[Any, Any]]) -> None:
        env: Any = envs[i].unwrapped
        env.set_task(task)
        self._tasks[i] = task
        if self.features:
            numbers = _numbers(task) or []
            if len(numbers) != self.features:
                raise RecipeError(
                    f"data.env: Gym({self._make.id!r}) gave a task of {len(numbers)} numbers; the first had "
                    f"{self.features}"
                )
            # A new tensor, since the former one has been given away.
            self._shown = self._shown.clone()
            self._shown[i] = torch.tensor(numbers)

    def shown(self) -> Tensor | None:
        return self._shown if self.features else None

    def example(self) -> Env[Any, Any]:
        env = self._make()
        whole: Any = env.unwrapped
        whole.set_task(self._tasks[0])
        return env

    def save(self) -> list[Any]:
        return [pack(task) for task in self._tasks]

    def load(self, state: Any, envs: list[Env[Any, Any]]) -> None:
        for i, task in enumerate(state):
            self._set(i, unpack(task), envs)

    def close(self) -> None:
        self._sampler.close()


def _name(task: Mapping[str, Any]) -> str:
    name = " ".join(f"{key} {value}" for key, value in task.items()) or "plain"
    # Such as a tracker takes in a metric's name.
    return "".join(letter if letter.isalnum() or letter in " _-." else "_" for letter in name)


def _numbers(task: Any) -> list[float] | None:
    """All numbers of a task in order; none where there is anything else in it."""
    if isinstance(task, Mapping):
        task = list(task.values())
    if isinstance(task, list | tuple):
        parts = [_numbers(part) for part in task]
        return None if any(part is None for part in parts) else [number for part in parts for number in part or []]
    try:
        array = np.asarray(task, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return None if isinstance(task, str | bytes) else [float(number) for number in array.reshape(-1)]
