"""A replay buffer that stores every observation once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from lightning_hyper.checkpoint_file import CheckpointError, EntryError, read_archive, require_like
from lightning_hyper.checks import require_memory

Minibatch = dict[str, Tensor]
TOGETHER = 16_384  # frames of a block: many minibatches by one look-up, within the processor's cache


class CompactReplayBuffer:
    """The newest `capacity` frames of `num_envs` environments.

    Frames lie by time, then by environment, so that what is shown after a frame lies `num_envs` rows on; only where an
    episode ended, and for the newest frames, is it kept apart.

    Args:
        capacity: frames; rounded up to whole steps of all environments.
        num_envs: environments whose frames come together.
        shown: for each entry of a step that is stored, that of one environment (of which shape and type matter).
        action: the action of one environment.
        state_features: features of a policy's state before each frame, 0 for none.
        n_step: rewards that a sample adds up before it bootstraps.
        sequence: frames of a sample, one after the other in one environment.
        prioritized: exponents (alpha, beta) of prioritised sampling (Schaul et al. 2016); None samples uniformly.
        device: where samples are wanted, and where the frames live.
        memmap: folder of memory-mapped files to keep the frames in; None keeps them on the device.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        shown: Mapping[str, Tensor],
        action: Tensor,
        *,
        state_features: int = 0,
        n_step: int = 1,
        sequence: int = 1,
        prioritized: tuple[float, float] | None = None,
        device: torch.device | str = "cpu",
        memmap: Path | None = None,
    ) -> None:
        self.capacity, self.num_envs = -(-capacity // num_envs) * num_envs, num_envs
        self.n_step, self.sequence, self.prioritized = n_step, sequence, prioritized
        self.device, self.shown = torch.device(device), tuple(shown)
        row = {**shown, "action": action, "reward": torch.zeros(()), "terminated": torch.zeros((), dtype=torch.bool)}
        row["end"] = torch.zeros((), dtype=torch.int32)  # number of the last observation kept apart, -1 for none
        if state_features:
            row["context_state"] = torch.zeros(state_features)
        self._row = {key: (entry.shape, entry.dtype) for key, entry in row.items()}
        if memmap is None:
            require_memory("data.capacity", self.capacity * self.frame_bytes)
        self._frames = {key: self._empty(key, memmap) for key in row}
        self._home = self._frames["end"].device
        self._ends = _Ends(self.shown)
        self._newest: dict[str, Tensor] = {}  # what is shown after the newest frame of each environment
        self._cursor = 0  # row that is written next
        self._count = 0
        self._priorities = None if prioritized is None else Priorities(self.capacity, self._home)
        self._largest = 1.0

    def _empty(self, key: str, memmap: Path | None) -> Tensor:
        shape, dtype = self._row[key]
        if memmap is None:
            return torch.zeros(self.capacity, *shape, dtype=dtype, device=self.device)
        memmap.mkdir(parents=True, exist_ok=True)
        size = self.capacity * shape.numel()
        return torch.from_file(str(memmap / key), shared=True, size=size, dtype=dtype).view(self.capacity, *shape)

    def __len__(self) -> int:
        return self._count

    @property
    def frame_bytes(self) -> int:
        """Bytes that a frame takes."""
        return sum(shape.numel() * dtype.itemsize for shape, dtype in self._row.values())

    def extend(self, batch: TensorDictBase) -> None:
        """Take in a collected batch `[num_envs, time]`; the oldest frames make room."""
        after = batch["next"]
        done = self._by_time(after["done"]).reshape(-1)
        count = len(done)
        rows = torch.arange(self._cursor, self._cursor + count, device=self._home) % self.capacity
        if len(overwritten := rows[self.capacity - self._count :]):
            self._ends.forget(int((self._frames["end"][overwritten] >= 0).sum()))
        end = torch.full((count,), -1, dtype=torch.int32, device=self._home)
        ended = done.nonzero().squeeze(-1)
        if len(ended):
            end[ended] = self._ends.append({key: self._by_time(after[key])[ended] for key in self.shown})
        given = {key: batch[key] for key in self._row if key in self.shown or key in ("action", "context_state")}
        given |= {key: after[key].squeeze(-1) for key in ("reward", "terminated")}
        for key, entry in given.items():
            self._frames[key][rows] = self._by_time(entry)
        self._frames["end"][rows] = end
        self._newest = {key: after[key][:, -1].to(self._home, copy=True) for key in self.shown}
        self._cursor = (self._cursor + count) % self.capacity
        self._count = min(self._count + count, self.capacity)
        if self._priorities is not None:
            self._priorities.set(rows, torch.full((count,), self._largest, dtype=torch.float64, device=self._home))

    def held(self, *keys: str) -> dict[str, Tensor]:
        """Entries `[frames, ...]` of all frames that it holds."""
        return {key: self._frames[key][: self._count] for key in keys}

    def _by_time(self, entry: Tensor) -> Tensor:
        """Entry `[num_envs, time, ...]` in the order of the rows."""
        return entry.transpose(0, 1).flatten(0, 1).to(self._home)

    def blocks(self, count: int, size: int) -> Iterator[Minibatch]:
        """Sample `count` minibatches of `size`, many in one block; `split` takes a block apart.

        Single frames have the entries of their step and, under `next_`, those of the step that follows (after `n_step`
        frames, or where the episode ends before), `[size, ...]`; `action`, `reward` `[size, n_step]` (zero past the end
        of an episode), `steps` `[size]` (rewards counted), `terminated` `[size]`, whether what follows is a terminal
        state, and, from prioritised sampling, `index` and importance weights `weight` `[size]`.

        Windows of `sequence` frames have `action`, `reward`, `steps` and `terminated` `[size, sequence, ...]`,
        `context_state` `[size, state_features]` before the first frame, and under `window_` the entries of steps
        `[size, length, ...]`: those of the frames at `place` `[size, sequence]`, each followed by what followed it.
        That is the next frame's, but where an episode ends its last step lies between, so that a length may differ.
        """
        # Priorities change with every update, so that prioritised minibatches come one by one.
        together = 1 if self.prioritized else max(1, TOGETHER // (size * self.sequence))
        for start in range(0, count, together):
            sample = self._sample(min(together, count - start) * size)
            yield {key: entry.to(self.device) for key, entry in sample.items()}

    def _sample(self, size: int) -> Minibatch:
        if self.prioritized is not None and self._priorities is not None:
            index, priority = self._priorities.draw(size)
            weight = (priority / priority.min()) ** -self.prioritized[1]
            return {**self._frames_at(index), "index": index, "weight": weight.float()}
        newest = (self.sequence - 1) * self.num_envs  # frames that begin no window, for want of frames after them
        age = torch.randint(newest, self._count, (size,), device=self._home)
        index = (self._cursor - 1 - age) % self.capacity
        return self._frames_at(index) if self.sequence == 1 else self._windows_at(index)

    def prioritize(self, index: Tensor, error: Tensor) -> None:
        """Set the priority of sampled frames to the size of their error `[size]`; uniform sampling has none."""
        if self.prioritized is None or self._priorities is None:
            return
        priority = (error.to(self._home, torch.float64) + 1e-8) ** self.prioritized[0]
        self._largest = max(self._largest, float(priority.max()))
        self._priorities.set(index.to(self._home), priority)

    def _frames_at(self, index: Tensor) -> Minibatch:
        """Single frames, each with what follows after `n_step` of them."""
        frames, last = self._frames, index
        alive, steps = torch.ones_like(index, dtype=torch.bool), torch.ones_like(index)
        rewards = [frames["reward"][index]]
        for _ in range(self.n_step - 1):
            alive = alive & (frames["end"][last] < 0) & (self._age(last) >= self.num_envs)
            last = torch.where(alive, (last + self.num_envs) % self.capacity, last)
            rewards.append(frames["reward"][last] * alive)
            steps = steps + alive
        return {
            **{key: frames[key][index] for key in self.shown},
            **{f"next_{key}": entry for key, entry in self._after(last).items()},
            "action": frames["action"][index],
            "reward": torch.stack(rewards, -1),
            "steps": steps,
            "terminated": frames["terminated"][last],
        }

    def _windows_at(self, index: Tensor) -> Minibatch:
        """Windows that begin at frames."""
        time = torch.arange(self.sequence, device=self._home)
        rows = (index.unsqueeze(-1) + time * self.num_envs) % self.capacity
        frames = {key: entry[rows] for key, entry in self._frames.items() if key != "context_state"}
        ended = frames.pop("end") >= 0
        place = time + ended.cumsum(1) - ended.long()  # an episode's last step moves on all that comes after
        length = int(place.max()) + 2
        sample = {"place": place, "context_state": self._frames["context_state"][index]}
        row = torch.arange(len(index), device=self._home).unsqueeze(-1)
        for key, after in self._after(rows.flatten()).items():
            shown = frames.pop(key)
            window = shown.new_zeros(len(index), length, *shown.shape[2:])
            window[row, place + 1] = after.view_as(shown)
            window[row, place] = shown
            sample[f"window_{key}"] = window
        reward = frames.pop("reward").unsqueeze(-1)
        return {**sample, **frames, "reward": reward, "steps": torch.ones_like(place)}

    def _after(self, rows: Tensor) -> dict[str, Tensor]:
        """What is shown after frames."""
        following, age, end = (rows + self.num_envs) % self.capacity, self._age(rows), self._frames["end"][rows]
        newest = (age < self.num_envs).nonzero().squeeze(-1)
        ended = (end >= 0).nonzero().squeeze(-1)
        shown = {}
        for key in self.shown:
            entry = shown[key] = self._frames[key][following]
            if len(newest):
                entry[newest] = self._newest[key][self.num_envs - 1 - age[newest]]
            if len(ended):
                entry[ended] = self._ends.entry(key, end[ended])
        return shown

    def _age(self, index: Tensor) -> Tensor:
        """Frames written since: 0 for the newest row."""
        return (self._cursor - 1 - index) % self.capacity

    def save(self, folder: Path) -> None:
        """Write everything into an existing folder."""
        # A view would be saved with all that it is a view of.
        whole = self._count == self.capacity
        frames = {key: entry if whole else entry[: self._count].clone() for key, entry in self._frames.items()}
        state: dict[str, Any] = {
            "capacity": self.capacity,
            "num_envs": self.num_envs,
            "cursor": self._cursor,
            "newest": self._newest,
            "ends": self._ends.save_state(),
            "frames": {key: entry.cpu() for key, entry in frames.items()},
        }
        if self._priorities is not None:
            rows = torch.arange(self._count, device=self._home)
            state |= {"priorities": self._priorities.of(rows).cpu(), "largest": self._largest}
        try:
            torch.save(state, folder / "frames.pt")
        except RuntimeError as error:  # what PyTorch makes of a full disk
            raise OSError(f"cannot write {folder / 'frames.pt'}: {error}") from error

    def load(self, folder: Path, frames: int) -> None:
        """Continue from what `save` wrote.

        Args:
            folder: where it lies.
            frames: that have been written in all.

        Raises:
            CheckpointError: the folder is missing, damaged, or of another task, capacity or frame.
        """
        path = folder / "frames.pt"
        if not path.exists():
            raise CheckpointError(f"ckpt_path: the checkpoint's replay buffer {path} is missing")
        state = read_archive(path, "ckpt_path: the checkpoint's replay buffer")
        try:
            self._require_mine(state, frames)
        except EntryError as error:
            said = f"is damaged or another's: its {error}"
            raise CheckpointError(f"ckpt_path: the checkpoint's replay buffer {path} {said}") from error
        self._cursor, self._count = state["cursor"], min(frames, self.capacity)
        self._newest = {key: entry.to(self._home) for key, entry in state["newest"].items()}
        for key, entry in state["frames"].items():
            self._frames[key][: self._count] = entry
        self._ends.load_state(state["ends"], self._home)
        if self._priorities is not None:
            priorities = state["priorities"].to(self._home)
            self._priorities.set(torch.arange(self._count, device=self._home), priorities)
            self._largest = state["largest"]

    def _require_mine(self, state: dict[str, Any], frames: int) -> None:
        count, newest = min(frames, self.capacity), self.shown if frames else ()
        rows = {key: torch.empty(0, *shape, dtype=dtype) for key, (shape, dtype) in self._row.items()}
        own: dict[str, Any] = {
            "capacity": 0,
            "num_envs": 0,
            "cursor": 0,
            "newest": {key: rows[key].new_zeros(self.num_envs, *rows[key].shape[1:]) for key in newest},
            "ends": {"rows": {}, "first": 0, "forgotten": 0},
            "frames": {},
        }
        if self._priorities is not None:
            own |= {"priorities": torch.zeros(0, dtype=torch.float64), "largest": 0.0}
        for key in ("capacity", "num_envs"):
            if state.get(key) != getattr(self, key):
                raise EntryError(f"{state.get(key)!s:.40} is not {getattr(self, key)}", key)
        frames_of = state.get("frames")
        there = {key: _row(entry) for key, entry in frames_of.items()} if isinstance(frames_of, dict) else frames_of
        if there != self._row:
            raise EntryError(f"are of another task: {there} there, {self._row} here", "frames")
        require_like(state, own)
        ends = state["ends"]
        kept = {key: rows[key] for key in (self.shown if ends["rows"] else ())}
        require_like({key: entry[:0] for key, entry in ends["rows"].items()}, kept, "ends", "rows")
        lengths = {len(entry) for entry in state["frames"].values()}
        if lengths != {count} or state["cursor"] != frames % self.capacity:
            raise EntryError(f"are {max(lengths)} up to row {state['cursor']}, not those of frame {frames:,}", "frames")
        ended = state["frames"]["end"][state["frames"]["end"] >= 0] - ends["first"]
        most = min((len(entry) for entry in ends["rows"].values()), default=0)
        if not 0 <= ends["forgotten"] <= most or (len(ended) and not 0 <= int(ended.min()) <= int(ended.max()) < most):
            raise EntryError("are not the ends of its episodes", "ends")
        if self._priorities is not None and (len(state["priorities"]) != count or (state["priorities"] <= 0).any()):
            raise EntryError("are not positive, or not one for each frame", "priorities")


def _row(entry: Any) -> tuple[torch.Size, torch.dtype] | None:
    return (entry.shape[1:], entry.dtype) if isinstance(entry, Tensor) and entry.ndim else None


def split(block: Minibatch, size: int) -> Iterator[Minibatch]:
    """The minibatches of `size` that lie in a block."""
    for entries in zip(*(entry.split(size) for entry in block.values()), strict=True):
        yield dict(zip(block, entries, strict=True))


class Priorities:
    """Priorities of `capacity` rows and a tree of their sums, of three levels, which suits batched look-ups."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.width = next(width for width in range(2, capacity + 2) if width**3 >= capacity)
        sizes = (self.width, self.width**2, self.width**3)
        self._levels = [torch.zeros(size, dtype=torch.float64, device=device) for size in sizes]

    def of(self, rows: Tensor) -> Tensor:
        """Priorities of rows."""
        return self._levels[-1][rows]

    def set(self, rows: Tensor, priority: Tensor) -> None:
        """Give rows a priority each."""
        self._levels[-1][rows] = priority
        for level in (1, 0):
            rows = rows // self.width
            self._levels[level][rows] = self._levels[level + 1].view(-1, self.width)[rows].sum(-1)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Rows in proportion to their priority, with replacement, and their priorities."""
        rows = torch.zeros(count, dtype=torch.int64, device=self._levels[0].device)
        for level in self._levels:
            sums = level.view(-1, self.width)[rows].cumsum(-1)
            share = torch.rand(count, 1, dtype=torch.float64, device=rows.device) * sums[:, -1:]
            place = torch.searchsorted(sums, share, right=True)
            # Where the share is rounded up to the whole: a row without priority is never drawn.
            place = torch.minimum(place, (sums < sums[:, -1:]).sum(-1, keepdim=True))
            rows = rows * self.width + place.squeeze(-1)
        return rows, self.of(rows)


class _Ends:
    """What the last step of every stored episode shows, numbered in the order of the episodes' ends."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._keys = keys
        self._rows: dict[str, Tensor] = {}
        self._first, self._count = 0, 0  # number of the first row, and rows in use; those before are forgotten
        self._forgotten = 0

    def append(self, shown: dict[str, Tensor]) -> Tensor:
        """Store entries `[count, ...]`; gives their numbers."""
        more = len(shown[self._keys[0]])
        needed = self._count + more
        if not self._rows or needed > len(self._rows[self._keys[0]]):
            kept, size = slice(self._forgotten, self._count), max(64, 2 * (needed - self._forgotten))
            for key, entry in shown.items():
                grown = entry.new_zeros(size, *entry.shape[1:])
                if key in self._rows:
                    grown[: self._count - self._forgotten] = self._rows[key][kept]
                self._rows[key] = grown
            self._first, self._count = self._first + self._forgotten, self._count - self._forgotten
            self._forgotten = 0
        for key, entry in shown.items():
            self._rows[key][self._count : self._count + more] = entry
        start = self._first + self._count
        self._count += more
        device = shown[self._keys[0]].device
        return torch.arange(start, start + more, dtype=torch.int32, device=device)

    def forget(self, count: int) -> None:
        """The `count` oldest are needed no more."""
        self._forgotten += count

    def entry(self, key: str, numbers: Tensor) -> Tensor:
        """An entry of those with some numbers."""
        return self._rows[key][numbers - self._first]

    def save_state(self) -> dict[str, Any]:
        rows = {key: entry[: self._count].clone() for key, entry in self._rows.items()}
        return {"rows": rows, "first": self._first, "forgotten": self._forgotten}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        self._rows = {key: entry.to(device) for key, entry in state["rows"].items()}
        self._first, self._forgotten = state["first"], state["forgotten"]
        self._count = len(self._rows[self._keys[0]]) if self._rows else 0
