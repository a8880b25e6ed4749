"""An episodic memory over many tasks: observations of completed episodes with what they were worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from lightning_hyper.checkpoint_file import CheckpointError, EntryError, read_checkpoint
from lightning_hyper.checks import Count, RecipeError, checked
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

    @checked
    def __init__(
        self, *, capacity: Count = 50, rule: Rule | None = None, recentre: bool = True, prefill: str | None = None
    ) -> None:
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
            CheckpointError: the checkpoint of a prefilled memory is missing, damaged or foreign.
            RecipeError: a rule that does not fit; a prefilled memory of other observations or tasks.
        """
        self.rule.begin(self.capacity, spaces.tasks)
        self.generator.manual_seed(seed)
        self._kept, self._spaces = {*entries, "value", "episode_return"} - {"state_value"}, spaces
        if self.prefill is not None:
            self._prefill(self.prefill, spaces, device)

    def _prefill(self, path: str, spaces: Spaces, device: torch.device | None) -> None:
        checkpoint = read_checkpoint(path, key="model.memory.prefill")
        held = next((rank["algorithm"].get("memory") for rank in checkpoint.get("ranks", ())), None)
        if not isinstance(held, dict) or not held.get("entries"):
            raise RecipeError(f"model.memory.prefill: {path} is of a run without a memory, or with an empty one")
        if not Spaces(**checkpoint["spaces"]).fits(spaces):
            raise RecipeError(f"model.memory.prefill: {path} remembers {checkpoint['spaces']}; data.env has {spaces}")
        there, here = set(held["entries"]), self._kept
        if there != here:
            raise RecipeError(
                f"model.memory.prefill: {path} keeps {', '.join(sorted(there))} of each step, and this agent needs "
                f"{', '.join(sorted(here))}; take a run with the same kinds of model.context"
            )
        try:
            stamps = self._stamps(held)
            self._require_rows(held["entries"], len(stamps))
        except EntryError as error:
            error.entry = ("ranks.0.algorithm.memory", *error.entry)
            raise CheckpointError(f"model.memory.prefill: {path} is damaged: its entry {error}") from error
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

    @staticmethod
    def _stamps(state: dict[str, Any]) -> Tensor:
        stamps = state.get("stamps")
        if not isinstance(stamps, Tensor) or stamps.dtype != torch.int64 or stamps.ndim != 1 or (stamps < 0).any():
            raise EntryError("are no counts", "stamps")
        return stamps

    def _require_rows(self, entries: dict[str, Any], capacity: int) -> None:
        """Check that entries of a checkpoint are what this agent remembers of its environment's steps."""
        spaces, number, one = self._spaces, torch.float32, (1,)
        rows: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
            "observation": (spaces.observation, None),
            "task": ((spaces.task,), number) if spaces.task else ((), torch.int64),
            "mission": ((), torch.int64),
            "previous_action": ((), torch.int64) if spaces.discrete else ((spaces.actions,), number),
            "previous_reward": (one, number),
            "episode_done": (one, number),
            "is_init": (one, torch.bool),
            "value": ((), number),
            "episode_return": ((), number),
        }
        counts = {"task": len(spaces.tasks), "mission": sum(map(len, spaces.missions))}
        for key in sorted({*self._kept, *entries}):
            entry = entries.get(key)
            if key not in self._kept or not isinstance(entry, Tensor):
                raise EntryError("is missing, no tensor, or not of this agent", "entries", key)
            shape, dtype = rows.get(key, (entry.shape[1:], None))
            if entry.shape != (capacity, *shape) or dtype not in (None, entry.dtype):
                raise EntryError(f"is a tensor of {tuple(entry.shape)} {entry.dtype}", "entries", key)
            if not bool(entry.isfinite().all()):
                raise EntryError("is NaN or infinite", "entries", key)
            if counts.get(key) and not 0 <= int(entry.min()) <= int(entry.max()) < counts[key]:
                raise EntryError(f"is not below {counts[key]}", "entries", key)

    def save_state(self) -> dict[str, Any]:
        """Everything, as plain tensors."""
        return {
            "entries": {} if self.entries is None else self.entries.clone().to_dict(),
            "stamps": self.stamps.clone(),
            "inserted": self.inserted,
            "generator": self.generator.get_state(),
        }

    def load_state(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        """Continue from `save_state`, after `begin`.

        Raises:
            EntryError: the state is not one of this agent's memory; names what differs.
            RecipeError: the state is of another capacity.
        """
        stamps = self._stamps(state)
        if len(stamps) != self.capacity:
            raise RecipeError(f"model.memory.capacity is {self.capacity}, but the state holds {len(stamps)}")
        if state["entries"] or bool((stamps > 0).any()):
            self._require_rows(state["entries"], self.capacity)
        self.entries = TensorDict(state["entries"], batch_size=[self.capacity]).to(device) if state["entries"] else None
        self.stamps, self.inserted = stamps.clone(), state["inserted"]
        self.generator.set_state(state["generator"])
