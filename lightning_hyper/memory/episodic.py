"""An episodic memory over many tasks: observations of completed episodes with what they were worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDict
from torch import Tensor

from lightning_hyper.checkpoint_file import read_checkpoint

Rule = Literal["uniform", "newest", "best_return", "task_quota"]


class EpisodicMemory:
    """At most `capacity` entries <observation, value, task, mission>, on the device of what is inserted.

    Args:
        capacity: entries that it holds.
        rule: what enters and what leaves. `uniform` (the paper): as many draws with replacement from the new entries
            as there are, at most `capacity`, over the oldest ones; `newest`: the newest ones, over the oldest;
            `best_return`: those of the episodes with the highest return, old or new; `task_quota`: as `uniform`, with
            an equal share of the places for each task.
        recentre: shift new values so that their mean is that of the critic's values of the same observations.
        prefill: checkpoint of a run with a memory, whose entries this one begins with; null begins empty.

    Raises:
        ValueError: an option out of range.

    Source: arXiv 2306.10698 and its code.
    """

    def __init__(
        self, *, capacity: int = 50, rule: Rule = "uniform", recentre: bool = True, prefill: str | None = None
    ) -> None:
        if capacity < 1:
            raise ValueError(f"model.memory.capacity is {capacity}; it must be at least 1")
        if rule not in get_args(Rule):
            raise ValueError(f"model.memory.rule is {rule!r}; choose one of {', '.join(get_args(Rule))}")
        self.capacity, self.rule, self.recentre, self.prefill = capacity, rule, recentre, prefill
        self.generator = torch.Generator()
        self.inserted = 0  # entries ever written
        self.entries: TensorDict | None = None  # [capacity]
        self.stamps = torch.zeros(capacity, dtype=torch.int64)  # when each place was written, from 1; 0 for never

    def begin(
        self, shape: Sequence[int], missions: Sequence[Sequence[str]], seed: int, device: torch.device | None = None
    ) -> None:
        """Say what there is to remember, and seed what is drawn.

        Args:
            shape: of an observation.
            missions: texts of each task.
            seed: of the draws.
            device: where a prefilled memory's entries go.

        Raises:
            ValueError: too small for a quota of each task; a prefilled memory of other observations or tasks.
        """
        self.missions = tuple(tuple(texts) for texts in missions)
        tasks = len(missions)
        if self.rule == "task_quota" and self.capacity < tasks:
            raise ValueError(
                f"model.memory.capacity is {self.capacity}; with the rule 'task_quota' it must be at least one for "
                f"each of {tasks} tasks"
            )
        self.generator.manual_seed(seed)
        if self.prefill is not None:
            self._prefill(self.prefill, tuple(shape), device)

    def _prefill(self, path: str, shape: tuple[int, ...], device: torch.device | None) -> None:
        checkpoint = read_checkpoint(path, key="model.memory.prefill")
        held = checkpoint["ranks"][0]["algorithm"].get("memory", {}).get("entries")
        if not held:
            raise ValueError(f"model.memory.prefill: {path} is of a run without a memory, or with an empty one")
        there = checkpoint["spaces"]
        if tuple(there["image"]) != shape or tuple(map(tuple, there["missions"])) != self.missions:
            raise ValueError(
                f"model.memory.prefill: {path} remembers observations {tuple(there['image'])} of the tasks "
                f"{', '.join(there['tasks'])}; data.env has observations {shape}, or other tasks or missions"
            )
        stamps = checkpoint["ranks"][0]["algorithm"]["memory"]["stamps"]
        newest = stamps.argsort(descending=True)[: min(self.capacity, int((stamps > 0).sum()))].flip(0)
        rows = TensorDict(held, batch_size=stamps.shape)[newest].to(device)
        self.entries = rows[:1].expand(self.capacity).clone().zero_()
        self._write(torch.arange(len(newest)), rows)

    def __len__(self) -> int:
        return int((self.stamps > 0).sum())

    def insert(self, new: TensorDict) -> None:
        """Take in the steps `[N]` of completed episodes, in their order.

        Args:
            new: entries `observation`, `value`, `state_value` (the critic's), `task`, `mission`, `episode_return`.
        """
        if not len(new):
            return
        value = new["value"]
        if self.recentre:
            value = value - value.mean() + new["state_value"].squeeze(-1).mean()
        kept = ("observation", "task", "mission", "episode_return")
        rows = TensorDict({**{key: new[key] for key in kept}, "value": value}, batch_size=new.batch_size)
        if self.entries is None:
            self.entries = rows[:1].expand(self.capacity).clone().zero_()
        if self.rule == "task_quota":
            for task in range(len(self.missions)):
                places = torch.arange(task, self.capacity, len(self.missions))
                self._over_oldest(rows[rows["task"] == task], places)
        elif self.rule == "best_return":
            self._over_worst(rows)
        else:
            self._over_oldest(rows, torch.arange(self.capacity))

    def _over_oldest(self, rows: TensorDict, places: Tensor) -> None:
        count = min(len(rows), len(places))
        if not count:
            return
        if self.rule == "newest":
            chosen = torch.arange(len(rows) - count, len(rows))
        else:
            chosen = torch.randint(len(rows), (count,), generator=self.generator)
        oldest = places[self.stamps[places].argsort(stable=True)[:count]]
        self._write(oldest, rows[chosen.to(rows["value"].device)])

    def _over_worst(self, rows: TensorDict) -> None:
        assert self.entries is not None
        held = self.entries["episode_return"].cpu().masked_fill(self.stamps == 0, -torch.inf)
        offered = rows["episode_return"].cpu()
        # Stable, and the new ones first: of equal returns the new stay.
        best = torch.cat([offered, held]).argsort(descending=True, stable=True)[: self.capacity]
        entering = best[best < len(rows)]
        stays = torch.zeros(self.capacity, dtype=torch.bool)
        stays[best[best >= len(rows)] - len(rows)] = True
        self._write((~stays).nonzero().squeeze(-1)[: len(entering)], rows[entering.to(rows["value"].device)])

    def _write(self, places: Tensor, rows: TensorDict) -> None:
        assert self.entries is not None
        self.entries[places.to(rows["value"].device)] = rows
        self.stamps[places] = self.inserted + 1 + torch.arange(len(places))
        self.inserted += len(places)

    def draw(self, count: int | None = None) -> Tensor:
        """Places `[count]` of entries, without replacement; all of them where `count` is None or too large."""
        filled = (self.stamps > 0).nonzero().squeeze(-1)
        if count is None or count >= len(filled):
            return filled
        return filled[torch.randperm(len(filled), generator=self.generator)[:count]]

    def tasks_at(self, places: Tensor) -> Tensor:
        """Task of the entries at `places` `[K]`."""
        assert self.entries is not None
        task: Tensor = self.entries["task"]
        return task[places.to(task.device)]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain tensors."""
        return {
            "entries": {} if self.entries is None else self.entries.clone().to_dict(),
            "stamps": self.stamps.clone(),
            "inserted": self.inserted,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        """Continue from `state_dict`.

        Raises:
            ValueError: the state is of another capacity.
        """
        if len(state["stamps"]) != self.capacity:
            raise ValueError(f"model.memory.capacity is {self.capacity}, but the state holds {len(state['stamps'])}")
        self.entries = TensorDict(state["entries"], batch_size=[self.capacity]).to(device) if state["entries"] else None
        self.stamps, self.inserted = state["stamps"].clone(), state["inserted"]
        self.generator.set_state(state["generator"])
