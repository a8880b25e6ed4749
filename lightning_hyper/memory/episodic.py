"""An episodic memory over many tasks: observations of completed episodes with what they were worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from lightning_hyper.checkpoint_file import read_checkpoint
from lightning_hyper.checks import RecipeError
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.memory.rules import Rule, Uniform


class EpisodicMemory:
    """At most `capacity` steps of completed episodes with what they were worth, on the device of what is inserted.

    Args:
        capacity: entries that it holds.
        rule: what enters and what leaves for it; null for `Uniform`, the paper's.
        recentre: shift new values so that their mean is that of the critic's values of the same observations.
        prefill: checkpoint of a run with a memory, whose entries this one begins with; null begins empty.

    Raises:
        RecipeError: an option out of range.

    Source: arXiv 2306.10698 and its code.
    """

    def __init__(
        self, *, capacity: int = 50, rule: Rule | None = None, recentre: bool = True, prefill: str | None = None
    ) -> None:
        if capacity < 1:
            raise RecipeError(f"model.memory.capacity is {capacity}; it must be at least 1")
        self.capacity, self.rule, self.recentre, self.prefill = capacity, rule or Uniform(), recentre, prefill
        self.generator = torch.Generator()
        self.inserted = 0  # entries ever written
        self.entries: TensorDict | None = None  # [capacity]
        self.stamps = torch.zeros(capacity, dtype=torch.int64)  # when each place was written, from 1; 0 for never

    def begin(self, spaces: Spaces, seed: int, entries: Sequence[str], device: torch.device | None = None) -> None:
        """Say whose steps are remembered, and seed what is drawn.

        Args:
            spaces: sizes of the environment.
            seed: of the draws.
            entries: what is to be kept of each step.
            device: where a prefilled memory's entries go.

        Raises:
            RecipeError: a rule that does not fit; a prefilled memory of other observations or tasks.
        """
        self.rule.begin(self.capacity, spaces.tasks)
        self.generator.manual_seed(seed)
        if self.prefill is not None:
            self._prefill(self.prefill, spaces, entries, device)

    def _prefill(self, path: str, spaces: Spaces, entries: Sequence[str], device: torch.device | None) -> None:
        checkpoint = read_checkpoint(path, key="model.memory.prefill")
        held = checkpoint["ranks"][0]["algorithm"].get("memory", {})
        if not held.get("entries"):
            raise RecipeError(f"model.memory.prefill: {path} is of a run without a memory, or with an empty one")
        if not Spaces(**checkpoint["spaces"]).fits(spaces):
            raise RecipeError(f"model.memory.prefill: {path} remembers {checkpoint['spaces']}; data.env has {spaces}")
        there, here = set(held["entries"]), {*entries, "value", "episode_return"} - {"state_value"}
        if there != here:
            raise RecipeError(
                f"model.memory.prefill: {path} keeps {', '.join(sorted(there))} of each step, and this agent needs "
                f"{', '.join(sorted(here))}; take a run with the same kinds of model.context"
            )
        stamps = held["stamps"]
        newest = stamps.argsort(descending=True)[: min(self.capacity, int((stamps > 0).sum()))].flip(0)
        rows = TensorDict(held["entries"], batch_size=stamps.shape)[newest].to(device)
        self.entries = rows[:1].expand(self.capacity).clone().zero_()
        self._write(torch.arange(len(newest)), rows)

    def __len__(self) -> int:
        return int((self.stamps > 0).sum())

    def insert(self, new: TensorDict) -> None:
        """Take in the steps `[N]` of completed episodes, in their order.

        Args:
            new: entries `value`, `state_value` (the critic's), `episode_return`, and what else is to be remembered.
        """
        if not len(new):
            return
        value = new["value"]
        if self.recentre:
            value = value - value.mean() + new["state_value"].squeeze(-1).mean()
        rows = new.exclude("state_value").set("value", value)
        if self.entries is None:
            self.entries = rows[:1].expand(self.capacity).clone().zero_()
        places, chosen = self.rule.choose(rows, self.entries, self.stamps, self.generator)
        self._write(places, rows[chosen.to(rows["value"].device)])

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

    def at(self, places: Tensor) -> TensorDict:
        """The entries at `places` `[K]`."""
        assert self.entries is not None
        return self.entries[places.to(self.entries["value"].device)]

    def save_state(self) -> dict[str, Any]:
        """Everything, as plain tensors."""
        return {
            "entries": {} if self.entries is None else self.entries.clone().to_dict(),
            "stamps": self.stamps.clone(),
            "inserted": self.inserted,
            "generator": self.generator.get_state(),
        }

    def load_state(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        """Continue from `save_state`.

        Raises:
            RecipeError: the state is of another capacity.
        """
        if len(state["stamps"]) != self.capacity:
            raise RecipeError(f"model.memory.capacity is {self.capacity}, but the state holds {len(state['stamps'])}")
        self.entries = TensorDict(state["entries"], batch_size=[self.capacity]).to(device) if state["entries"] else None
        self.stamps, self.inserted = state["stamps"].clone(), state["inserted"]
        self.generator.set_state(state["generator"])
