"""Trials: several episodes of one task, between which an agent may learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrl.data import Composite, Unbounded

from lightning_hyper.checks import Count, RecipeError, checked
from lightning_hyper.envs.base import BatchedEnv

# What trials count for themselves.
OWN = ("observation", "is_init", "previous_action", "previous_reward", "step_count", "episode_return")


class Trials(BatchedEnv):
    """A batch of trials: `episodes` episodes of one task each, of any environment that has tasks.

    A trial ends by termination at the end of its last episode, as its length is part of the task; it is never
    truncated. `episode_done` is 1 where the last frame ended an episode, whichever way; `step_count` and
    `episode_return` count over the trial.

    Args:
        env: makes the environment whose episodes these are.
        episodes: episodes of a trial.
        boundary: what the end of an episode shows, but for the last: `first`, the next episode's first observation;
            `last`, still the ended episode's last one, after which the next action acts from the next episode's start,
            which was not shown.
        num_envs: trials stepped side by side; as `env` has it by default.
        device: where the tensors live; as `env` has it by default.

    Attributes:
        inner: the environment whose episodes these are.

    Raises:
        RecipeError: an environment without tasks, or a count or name out of range.

    Source: Duan et al. 2016 (arXiv 1611.02779), trials; the boundary `last` is that of the code of Zintgraf et al. 2020
    (VariBAD) and Beck et al. 2023 (arXiv 2309.14970).
    """

    @checked
    def __init__(
        self,
        env: Callable[[], BatchedEnv],
        episodes: Count = 2,
        boundary: Literal["first", "last"] = "first",
        num_envs: Count | None = None,
        device: str | None = None,
    ) -> None:
        given = {"num_envs": num_envs, "device": device}
        # Typed without arguments, so that jsonargparse takes a recipe's for all of its.
        make = cast(Callable[..., BatchedEnv], env)
        inner = make(**{key: value for key, value in given.items() if value is not None})
        if not inner.has_tasks:
            raise RecipeError(
                f"data.env: Trials needs an environment with tasks; {type(inner).__name__} has none, so use it alone"
            )
        super().__init__(inner.batch_size[0], str(inner.device))
        self.inner, self.episodes, self.boundary = inner, episodes, boundary
        self.generator = inner.generator
        self.horizon = episodes * inner.horizon
        self.tasks, self.missions, self.has_tasks = inner.tasks, inner.missions, True
        self.raw, self.seconds = inner.raw, inner.seconds
        self._more = tuple(name for name in inner.observation_spec.keys() if name not in OWN)  # noqa: SIM118
        self._episode = torch.zeros(*self.batch_size, 1, device=self.device, dtype=torch.int64)
        self._over = torch.zeros_like(self._episode, dtype=torch.bool)
        self._ended_at: NDArray[Any] | None = None
        self.action_spec, self.reward_spec = inner.action_spec.clone(), inner.reward_spec.clone()
        self.full_done_spec = inner.full_done_spec.clone()
        count = Unbounded((*self.batch_size, 1), device=self.device, dtype=torch.int64)
        flag = Unbounded((*self.batch_size, 1), device=self.device, dtype=torch.float32)
        entries = {**inner.observation_spec.clone(), "episode_done": flag, "episode": count}
        self.observation_spec = Composite(entries, shape=self.batch_size)

    def _set_seed(self, seed: int | None) -> None:
        self.inner.set_seed(seed)

    def draw_tasks(self, rows: Tensor) -> None:
        self.inner.in_turn = self.in_turn
        self.inner.draw_tasks(rows)

    def start(self, rows: Tensor) -> None:
        self._shown = cast(dict[str, Tensor], self.inner.begin(rows, same_task=True))
        self._episode = self._episode.masked_fill(rows.unsqueeze(-1), 0)
        self._over = torch.zeros_like(self._over)

    def observation(self) -> Tensor:
        return self._shown["observation"]

    def simulate(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        step = self.inner.advance(action)
        shown, self._over = step, step["done"]
        self._episode = self._episode + self._over
        finished = self._episode >= self.episodes
        again = self._over & ~finished
        if again.any():
            self._ended_at = self.inner.places()
            # Rows that go on show what they showed.
            following = self.inner.begin(again.squeeze(-1), same_task=True)
            shown = following if self.boundary == "first" else step
        self._shown = cast(dict[str, Tensor], shown)
        return shown["observation"], step["reward"].squeeze(-1), (finished & self._over).squeeze(-1)

    def entries(self) -> dict[str, Tensor]:
        inner = {name: self._shown[name] for name in self._more}
        return {**inner, "episode_done": self._over.float(), "episode": self._episode}

    def snapshot(self) -> dict[str, Any]:
        return {"inner": self.inner.save_state(), "episode": self._episode.clone()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state(state["inner"])
        self._episode = state["episode"].to(self.device, copy=True)

    def render(self) -> NDArray[Any] | None:
        return self.inner.render()

    def filmed(self) -> BatchedEnv:
        return Trials(self.inner.filmed, self.episodes, self.boundary)

    def sight(self) -> NDArray[Any]:
        return self.inner.sight()

    def film(self, sights: Sequence[NDArray[Any]], path: Path, seconds: float) -> None:
        self.inner.film(sights, path, seconds)

    def places(self) -> NDArray[Any] | None:
        now = self.inner.places()
        begun = bool(self._over[0]) and int(self._episode[0]) < self.episodes
        if now is None or self._ended_at is None or not begun:
            return now
        return np.concatenate((self._ended_at, now))

    def draw_map(self, axes: Any) -> None:
        self.inner.draw_map(axes)

    def close(self, *, raise_if_closed: bool = True) -> None:
        self.inner.close(raise_if_closed=raise_if_closed)
        super().close(raise_if_closed=raise_if_closed)

    @property
    def why_not_exact(self) -> str:
        return self.inner.why_not_exact
