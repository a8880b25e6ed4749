"""What the environments share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from lightning_hyper.checks import Count, RecipeError, checked
from lightning_hyper.envs.keys import Step
from lightning_hyper.envs.rendering import FilmError, write_gif


class BatchedEnv(EnvBase):
    """A batch of episodes side by side, whose randomness comes from one generator of its own.

    It is played by `begin` and `advance`, in plain dictionaries; TorchRL's `reset` and `step` are shells around them.
    It may be stepped beyond `done`, as an evaluation does until the last episode ends; what follows belongs to no
    episode. A subclass sets `horizon`, calls `_make_specs`, and overrides `start`, `simulate` and `observation`; where
    it needs to, also `truncated`, `entries`, `draw_tasks`, and `snapshot` with `restore`.

    Args:
        num_envs: episodes stepped side by side.
        device: where the tensors live.

    Attributes:
        horizon: frames from a reset to `done` at the latest.
        generator: draws what a reset leaves to chance.
        tasks: name of each task, where `task` is an index.
        missions: texts of each task's missions; `mission` counts through all of them in order.
        has_tasks: whether episodes are of different tasks.
        raw: the spaces of a Gymnasium environment, `observation` and `action`, as plain data; see `gym_spaces`.
        seconds: simulated time of a frame, where that is known.
        simulates: whether it can be branched: the state that it saves is tensors with a row for each environment, from
            which any number of copies goes on by `simulate`.
        in_turn: hand tasks out in turn, environment by environment, rather than draw them, so that an evaluation has
            each of them equally often; for families of few tasks.
        current: what is shown now, once begun.

    Raises:
        RecipeError: a count out of range.
    """

    batch_locked = True
    horizon: int
    tasks: tuple[str, ...] = ()
    missions: tuple[tuple[str, ...], ...] = ()
    has_tasks: bool = False
    raw: dict[str, Any] | None = None
    seconds: float | None = None
    simulates: bool = False
    in_turn: bool = False
    current: Step | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> BatchedEnv:
        # TorchRL binds its own `__new__` to each class, behind which jsonargparse does not find the constructor.
        made: BatchedEnv = super().__new__(cls)
        return made

    @checked
    def __init__(self, num_envs: Count, device: str) -> None:
        super().__init__(device=torch.device(device), batch_size=torch.Size([num_envs]))
        self.generator = torch.Generator(device=self.device)

    def _make_specs(
        self,
        observation: Sequence[int],
        action: int | tuple[Tensor, Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        task_features: int = 0,
        more: Mapping[str, TensorSpec] | None = None,
    ) -> None:
        """Say what there is; `tasks` and `missions` are told by the attributes.

        Args:
            observation: shape of one.
            action: how many there are to choose from, or lowest and highest `[actions]`, infinite where unbounded.
            dtype: of the observation.
            task_features: of a task that is a vector.
            more: entries besides those of `Step`.
        """
        n = self.batch_size[0]

        def real(*shape: int) -> Unbounded:
            return Unbounded((n, *shape), device=self.device, dtype=torch.float32)

        def index(count: int) -> Categorical:
            return Categorical(count, shape=(n,), device=self.device, dtype=torch.int64)

        def flag() -> Binary:
            return Binary(1, (n, 1), device=self.device, dtype=torch.bool)

        def chosen() -> TensorSpec:
            if isinstance(action, int):
                return index(action)
            low, high = (edge.to(self.device, torch.float32).expand(n, -1) for edge in action)
            if low.isinf().all() and high.isinf().all():
                return real(low.shape[1])
            return Bounded(low, high, shape=low.shape, device=self.device, dtype=torch.float32)

        self.action_spec = chosen()
        self.reward_spec = real(1)
        self.full_done_spec = Composite(done=flag(), terminated=flag(), truncated=flag(), shape=(n,))
        entries = {
            "observation": Unbounded((n, *observation), device=self.device, dtype=dtype),
            "is_init": flag(),
            # Zeros at a reset need not lie within an action's bounds.
            "previous_action": index(action) if isinstance(action, int) else real(len(action[0])),
            "previous_reward": real(1),
            "step_count": Unbounded((n, 1), device=self.device, dtype=torch.int64),
            "episode_return": real(1),
            **(more or {}),
        }
        if self.tasks or task_features:
            entries["task"] = index(len(self.tasks)) if self.tasks else real(task_features)
            self.has_tasks = True
        if self.missions:
            entries["mission"] = index(sum(map(len, self.missions)))
        self.observation_spec = Composite(entries, shape=(n,))

    # What a subclass overrides.

    @abstractmethod
    def start(self, rows: Tensor) -> None:
        """Start a new episode in each environment of `rows`, bool `[num_envs]`."""

    @abstractmethod
    def simulate(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One frame of all, without resets, counters or time limit.

        Args:
            action: `[num_envs]` or `[num_envs, actions]`, as `action_spec` has it.

        Returns:
            observation `[num_envs, ...]`, reward `[num_envs]`, float32, and terminated `[num_envs]`, bool.
        """

    @abstractmethod
    def observation(self) -> Tensor:
        """What is shown after `start`, `[num_envs, ...]`; environments that go on still show what they showed."""

    def truncated(self, step_count: Tensor) -> Tensor:
        """Whether each episode is cut off after so many frames, both `[num_envs, 1]`; at `horizon` by default."""
        return step_count >= self.horizon

    def entries(self) -> dict[str, Tensor]:
        """Entries besides those that this class makes: task, mission and what is the environment's own."""
        return {}

    def draw_tasks(self, rows: Tensor) -> None:
        """Draw the task of each environment of `rows`, bool `[num_envs]`, anew."""

    def chosen_tasks(self, count: int) -> Tensor:
        """One of `count` tasks for every environment, `[num_envs]`: drawn, or in turn."""
        if self.in_turn:
            return torch.arange(self.batch_size[0], device=self.device) % count
        # For all, so that what one environment draws does not depend on how many others begin with it.
        return torch.randint(count, self.batch_size, generator=self.generator, device=self.device)

    def snapshot(self) -> dict[str, Any]:
        """Tensors `[num_envs, ...]` and plain data that exact continuation needs of the subclass."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `snapshot` gave."""

    # What everybody calls.

    def begin(self, rows: Tensor | None = None, *, same_task: bool = False) -> Step:
        """Start new episodes.

        Args:
            rows: where, bool `[num_envs]`; everywhere by default.
            same_task: keep each environment's task.

        Returns:
            What all environments show now, also those that go on.
        """
        last = self.current
        if rows is None or last is None:
            rows = torch.ones(self.batch_size, dtype=torch.bool, device=self.device)
        if not same_task:
            self.draw_tasks(rows)
        self.start(rows)
        shown = {"observation": self.observation().to(self._dtype), **self._at_reset, **self.entries()}
        before = shown if last is None else cast(dict[str, Tensor], last)
        for name, entry in shown.items():
            shown[name] = torch.where(rows.view(-1, *[1] * (entry.dim() - 1)), entry, before[name])
        self.current = cast(Step, shown)
        # A dictionary of the caller's own, to which an action may be added.
        return cast(Step, dict(shown))

    def advance(self, action: Tensor) -> Step:
        """One frame of all environments; those that are done are not begun anew.

        Args:
            action: `[num_envs]` or `[num_envs, actions]`, as `action_spec` has it.

        Returns:
            What they show now, and what the frame gave: `reward`, `done`, `terminated` and `truncated`.
        """
        last = self.current
        if last is None:
            raise RuntimeError(f"{type(self).__name__}.advance: begin() comes first")
        observation, reward, terminated = self.simulate(action)
        reward, terminated = reward.to(torch.float32).unsqueeze(-1), terminated.to(torch.bool).unsqueeze(-1)
        step_count = last["step_count"] + 1
        done = self.truncated(step_count) | terminated
        shown = {
            "observation": observation.to(self._dtype),
            "is_init": torch.zeros_like(done),
            "previous_action": action,
            "previous_reward": reward,
            "step_count": step_count,
            "episode_return": last["episode_return"] + reward,
            **self.entries(),
        }
        self.current = cast(Step, shown)
        frame = {"reward": reward, "done": done, "terminated": terminated, "truncated": done ^ terminated}
        return cast(Step, shown | frame)

    def save_state(self) -> dict[str, Any]:
        """Tensors and plain data from which `load_state` continues exactly, with `exact`."""
        shown = None if self.current is None else _kept(self.current)
        state = {"generator": self.generator.get_state(), "current": shown}
        return state | self.snapshot() if self.exact else state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `save_state`: `current` is what was shown. Without `exact`, new episodes begin instead.

        Raises:
            RecipeError: the state is that of an environment with other options.
        """
        shown = state["current"]
        if shown is not None and len(shown["step_count"]) != self.batch_size[0]:
            raise RecipeError(
                f"ckpt_path: it was saved with {len(shown['step_count'])} environments (data.env.num_envs), and there "
                f"are {self.batch_size[0]} now; give the num_envs of the run that saved it"
            )
        self.generator.set_state(state["generator"].cpu())
        if not self.exact:
            self.begin()
            return
        if missing := self.snapshot().keys() ^ (state.keys() - {"generator", "current"}):
            raise RecipeError(
                f"ckpt_path: its {type(self).__name__} episodes were saved with other options of data.env (the states "
                f"differ in {', '.join(sorted(missing))}); give those of the run that saved them"
            )
        self.restore(state)
        self.current = None if shown is None else cast(Step, self._moved(shown))

    # What pictures and films ask: `sight` after `begin` and after every `advance`, then `film`; `places` and `draw_map`
    # where the environment is a plane. A subclass that makes pictures overrides `render`, which is enough.

    def render(self) -> NDArray[Any] | None:
        """A picture of the first environment, `[height, width, 3]`, uint8; None where it makes none."""
        return None

    def filmed(self) -> BatchedEnv:
        """The environment to film in place of this one, which may be another that was made to be looked at."""
        return self

    def sight(self) -> NDArray[Any]:
        """What `film` needs of the first environment as it is now; a picture by default.

        Raises:
            FilmError: it makes no pictures.
        """
        picture = self.render()
        if picture is None:
            raise FilmError(f"{type(self).__name__} makes no pictures")
        return picture

    def film(self, sights: Sequence[NDArray[Any]], path: Path, seconds: float) -> None:
        """Write a film of some sights, shown for so many seconds each, to a file that ends in `.gif`.

        Raises:
            FilmError: it cannot be rendered here; the message says why.
        """
        write_gif(path, sights, seconds)

    def places(self) -> NDArray[Any] | None:
        """Where the last frame has brought the first environment, `[1, 2]`; None where it has no map.

        At the end of a trial's episode `[2, 2]`: also where the next one begins.
        """
        return None

    def draw_map(self, axes: Any) -> None:
        """Draw what stands still around the first environment onto matplotlib's axes, and set their limits."""

    @property
    def exact(self) -> bool:
        """Whether `load_state` continues bit for bit."""
        return not self.why_not_exact

    @property
    def why_not_exact(self) -> str:
        """One sentence that says why not; empty where it does."""
        return ""

    @cached_property
    def _dtype(self) -> torch.dtype:
        return cast(torch.dtype, self.observation_spec["observation"].dtype)

    @cached_property
    def _at_reset(self) -> dict[str, Tensor]:
        names = ("previous_action", "previous_reward", "step_count", "episode_return")
        zeros = {name: self.observation_spec[name].zero() for name in names}
        return {"is_init": torch.ones_like(zeros["step_count"], dtype=torch.bool), **zeros}

    @property
    def frame_bytes(self) -> int:
        """Bytes of the observation and the action that a frame of one environment has."""
        entries = (self.observation_spec["observation"], self.action_spec)
        return sum(math.prod(entry.shape[1:]) * entry.dtype.itemsize for entry in entries)

    def _moved(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device, copy=True) for name, tensor in state.items()}

    # TorchRL's side.

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.generator.manual_seed(seed)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        rows = None if tensordict is None else tensordict.get("_reset", None)
        return self._packed(self.begin(None if rows is None else rows.reshape(-1)))

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self._packed(self.advance(tensordict.get("action")))

    def _packed(self, step: Step) -> TensorDictBase:
        return TensorDict(cast(dict[str, Any], step), batch_size=self.batch_size, device=self.device)


def _kept(step: Step) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in cast(dict[str, Tensor], step).items()}
