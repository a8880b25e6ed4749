"""A store of whole trials, or of whole episodes where the environment has no trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from lightning_hyper.checkpoint_file import EntryError

Steps = dict[str, Tensor]


class TrialStore:
    """Keeps the newest whole trials, step by step, with the observation in which each ended.

    A trial of H frames has H + 1 steps: all that was acted in, and the last one shown. It may begin in one batch and
    end in a later one.

    Args:
        capacity: trials that are kept; room is taken as they come.
        entries: what is kept of each step.
    """

    def __init__(self, capacity: int, entries: Sequence[str]) -> None:
        self.capacity, self.entries = capacity, tuple(entries)
        self.lengths = torch.zeros(0, dtype=torch.int64)  # steps of each trial that is kept
        self._kept: Steps = {}  # [trials, longest, ...]
        self._open: Steps = {}  # of the trials under way, [num_envs, longest, ...]
        self._next = 0  # place of the next trial

    def __len__(self) -> int:
        return len(self.lengths)

    def add(self, batch: TensorDict) -> None:
        """Take in a collected batch.

        Args:
            batch: `step_count` and the entries `[num_envs, time, ...]`; under `next` those that followed, and `done`.
        """
        count = batch["step_count"].squeeze(-1)
        done = batch["next", "done"].squeeze(-1)
        steps = {key: batch[key] for key in self.entries}
        after = {key: batch["next", key] for key in self.entries}
        longest = int(count.max()) + 2
        self._open = {key: _roomy(self._open.get(key), entry, longest) for key, entry in steps.items()}
        part = done.cumsum(1) - done.long()  # which of the batch's trials each step belongs to
        for k in range(int(part.max()) + 1):
            rows, times = (part == k).nonzero(as_tuple=True)
            for key, entry in steps.items():
                self._open[key][rows, count[rows, times]] = entry[rows, times]
            rows, times = ((part == k) & done).nonzero(as_tuple=True)
            for key, entry in after.items():
                self._open[key][rows, count[rows, times] + 1] = entry[rows, times]
            if len(rows):
                self._insert({key: entry[rows] for key, entry in self._open.items()}, count[rows, times] + 2)

    def _insert(self, trials: Steps, lengths: Tensor) -> None:
        lengths = lengths[-self.capacity :].cpu()
        places = (self._next + torch.arange(len(lengths))) % self.capacity
        self._next = int(places[-1] + 1) % self.capacity
        held = max(len(self.lengths), int(places.max()) + 1)
        grown = torch.zeros(held, dtype=torch.int64)
        grown[: len(self.lengths)] = self.lengths
        grown[places], self.lengths = lengths, grown
        for key, entry in trials.items():
            fresh = entry[-self.capacity :]
            kept = _roomy(self._kept.get(key), fresh, entry.shape[1], held)
            kept[places.to(kept.device), : fresh.shape[1]] = fresh
            self._kept[key] = kept

    def sample(self, count: int) -> tuple[Steps, Tensor]:
        """Different trials at random: entries `[count, longest, ...]`, and the steps of each, `[count]`.

        What lies after a trial's end is of no meaning.
        """
        chosen = torch.randperm(len(self.lengths))[:count]
        lengths = self.lengths[chosen]
        longest = int(lengths.max())
        trials = {key: entry[chosen.to(entry.device), :longest] for key, entry in self._kept.items()}
        return trials, lengths.to(next(iter(trials.values())).device)

    def save_state(self) -> dict[str, Any]:
        """Trials and those under way, as plain tensors."""
        held = len(self.lengths)
        return {
            "kept": {key: entry[:held].clone() for key, entry in self._kept.items()},
            "open": {key: entry.clone() for key, entry in self._open.items()},
            "lengths": self.lengths.clone(),
            "next": self._next,
        }

    def load_state(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        """Continue from `save_state`.

        Raises:
            EntryError: the state is not one of this store; names what differs.
        """
        lengths, held = state["lengths"], len(state["lengths"])
        if lengths.dtype != torch.int64 or lengths.ndim != 1 or held > self.capacity:
            raise EntryError(f"are no lengths of at most {self.capacity} trials", "lengths")
        for part, rows in (("kept", held), ("open", None)):
            entries = state[part]
            if entries and set(entries) != set(self.entries):
                raise EntryError(f"has {', '.join(sorted(entries))}, not {', '.join(sorted(self.entries))}", part)
            for key, entry in entries.items():
                if entry.ndim < 2 or (rows is not None and len(entry) != rows):
                    raise EntryError(f"is a tensor of {tuple(entry.shape)}", part, key)
                if part == "kept" and held and int(lengths.max()) > entry.shape[1]:
                    raise EntryError(f"has {entry.shape[1]} steps a trial, fewer than lengths says", part, key)
        self.lengths, self._next = lengths.clone(), int(state["next"])
        self._kept = {key: entry.to(device) for key, entry in state["kept"].items()}
        self._open = {key: entry.to(device) for key, entry in state["open"].items()}


def _roomy(held: Tensor | None, like: Tensor, longest: int, rows: int | None = None) -> Tensor:
    """What is held, with room for so many rows (those of `like`) and steps; a store doubles when it grows."""
    rows = len(like) if rows is None else rows
    if held is not None and len(held) >= rows and held.shape[1] >= longest:
        return held
    old = (0, 0) if held is None else (len(held), held.shape[1])
    more = rows if held is None else max(rows, 2 * old[0]) if rows > old[0] else old[0]
    grown = like.new_zeros(more, max(longest, old[1]), *like.shape[2:])
    if held is not None:
        grown[: old[0], : old[1]] = held
    return grown
