"""A replay buffer that stores every observation once."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import LazyMemmapStorage, LazyTensorStorage
from torchrl.data.replay_buffers import PrioritizedSampler, RandomSampler, ReplayBuffer

Minibatch = dict[str, Tensor]
Seen = Callable[[Minibatch], Minibatch]


class ReplayBufferError(ValueError):
    """A stored replay buffer that is missing, cut short, or of another task."""


class CompactReplayBuffer:
    """The newest `capacity` frames of `num_envs` environments, on TorchRL's storage and samplers.

    Frames lie by time, then by environment, so that the observation after a frame is the one `num_envs` rows on; only
    where an episode ended, and for the newest frames, is it kept apart.

    Args:
        capacity: frames; rounded up to whole steps of all environments.
        num_envs: environments whose frames come together.
        n_step: rewards that a sample adds up before it bootstraps.
        prioritized: exponents (alpha, beta) of prioritised sampling (Schaul et al. 2016); None samples uniformly.
        device: where the frames live.
        memmap: folder of memory-mapped files to keep the frames in; None keeps them in memory.

    Raises:
        ValueError: prioritised sampling without TorchRL's compiled part.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        *,
        n_step: int = 1,
        prioritized: tuple[float, float] | None = None,
        device: torch.device | str = "cpu",
        memmap: Path | None = None,
    ) -> None:
        self.num_envs, self.n_step, self.device = num_envs, n_step, torch.device(device)
        self.capacity = -(-capacity // num_envs) * num_envs
        self.prioritized = prioritized
        storage = (
            LazyTensorStorage(self.capacity, device=self.device)
            if memmap is None
            else LazyMemmapStorage(self.capacity, scratch_dir=str(memmap), existsok=True, device=self.device)
        )
        self._buffer = ReplayBuffer(storage=storage, sampler=self._sampler(), batch_size=1)
        self._ends = _Ends()
        self._newest: Tensor | None = None  # observation after the newest frame of each environment
        self._cursor = 0  # row that is written next

    def _sampler(self) -> RandomSampler | PrioritizedSampler:
        if self.prioritized is None:
            return RandomSampler()
        try:
            return PrioritizedSampler(self.capacity, *self.prioritized)
        except RuntimeError as error:
            raise ValueError(
                f"data.prioritized: TorchRL's compiled part does not load with torch {torch.__version__} ({error}); "
                "install the torch that this TorchRL was built for, or sample uniformly"
            ) from error

    def __len__(self) -> int:
        return len(self._buffer)

    @staticmethod
    def row(observation: Tensor, action: Tensor) -> TensorDict:
        """An empty frame, from one observation `[features]` and one action."""
        return TensorDict(
            {
                "observation": torch.zeros_like(observation),
                "action": torch.zeros_like(action),
                "reward": torch.zeros(()),
                "terminated": torch.zeros((), dtype=torch.bool),
                "end": torch.full((), -1, dtype=torch.int32),
            }
        )

    def extend(self, batch: TensorDict) -> None:
        """Take in a collected batch `[num_envs, time]`; the oldest frames make room."""
        batch = cast(TensorDict, batch.transpose(0, 1))
        count = batch.numel()
        done = batch["next", "done"].reshape(-1)
        after = batch["next", "observation"].to(self.device)
        overwritten = torch.arange(self._cursor, self._cursor + count, device=self.device) % self.capacity
        overwritten = overwritten[overwritten < len(self)]
        if len(overwritten):
            self._ends.forget(int((self._frames["end"][overwritten] >= 0).sum()))
        end = torch.full((count,), -1, dtype=torch.int32, device=self.device)
        ended = done.nonzero().squeeze(-1).to(self.device)
        end[ended] = self._ends.append(after.reshape(count, -1)[ended])
        self._buffer.extend(
            TensorDict(
                {
                    "observation": batch["observation"].reshape(count, -1),
                    "action": batch["action"].reshape(count, *batch["action"].shape[2:]),
                    "reward": batch["next", "reward"].reshape(-1),
                    "terminated": batch["next", "terminated"].reshape(-1),
                    "end": end,
                },
                batch_size=[count],
            ).to(self.device)
        )
        self._newest = after[-1].clone()
        self._cursor = (self._cursor + count) % self.capacity

    @property
    def _frames(self) -> TensorDict:
        # Indexing the storage itself is several times faster than TorchRL's `sample`.
        return cast(TensorDict, self._buffer.storage._storage)

    def minibatches(self, count: int, size: int, seen: Seen) -> Iterator[Minibatch]:
        """Draw `count` minibatches of `size` frames.

        `seen` turns what is drawn into what is handed out, for many minibatches at once.

        Each has `observation` `[size, features]`, `action`, `reward` `[size, n_step]` (zero past the end of an
        episode), `steps` `[size]` (rewards counted), `next_observation` after them, `terminated` `[size]`, whether
        that is a terminal state, and, from prioritised sampling, `index` and importance weights `weight` `[size]`.
        """
        if self.prioritized is not None:
            for _ in range(count):
                index, info = self._buffer.sampler.sample(self._buffer.storage, size)
                weight = torch.as_tensor(info["priority_weight"], device=self.device, dtype=torch.float32)
                yield {**seen(self._gather(index.to(self.device))), "index": index, "weight": weight}
            return
        together = max(1, 16_384 // size)  # many minibatches by one look-up, within the processor's cache
        for start in range(0, count, together):
            part = min(together, count - start)
            index, _ = self._buffer.sampler.sample(self._buffer.storage, part * size)
            drawn = seen(self._gather(index.to(self.device)))
            yield from (
                dict(zip(drawn, entries, strict=True))
                for entries in zip(*(entry.split(size) for entry in drawn.values()), strict=True)
            )

    def prioritize(self, index: Tensor, error: Tensor) -> None:
        """Set the priority of sampled frames to the size of their error `[size]`."""
        self._buffer.update_priority(index, error)

    def _gather(self, index: Tensor) -> Minibatch:
        frames, capacity = self._frames, self.capacity
        last, alive = index, torch.ones_like(index, dtype=torch.bool)
        rewards = [frames["reward"][index]]
        steps = torch.ones_like(index)
        for _ in range(self.n_step - 1):
            alive = alive & (frames["end"][last] < 0) & (self._age(last) >= self.num_envs)
            last = torch.where(alive, (last + self.num_envs) % capacity, last)
            rewards.append(frames["reward"][last] * alive)
            steps = steps + alive
        after = frames["observation"][(last + self.num_envs) % capacity]
        age = self._age(last)
        newest = (age < self.num_envs).nonzero().squeeze(-1)
        if len(newest):
            assert self._newest is not None
            after[newest] = self._newest[self.num_envs - 1 - age[newest]]
        end = frames["end"][last]
        ended = (end >= 0).nonzero().squeeze(-1)
        if len(ended):
            after[ended] = self._ends[end[ended]]
        return {
            "observation": frames["observation"][index],
            "action": frames["action"][index],
            "reward": torch.stack(rewards, -1),
            "steps": steps,
            "next_observation": after,
            "terminated": frames["terminated"][last],
        }

    def _age(self, index: Tensor) -> Tensor:
        """Frames written since: 0 for the newest row."""
        return (self._cursor - 1 - index) % self.capacity

    def save(self, folder: Path) -> None:
        """Write everything into an existing folder."""
        count = len(self)
        state: dict[str, Any] = {
            "capacity": self.capacity,
            "num_envs": self.num_envs,
            "cursor": self._cursor,
            "newest": self._newest,
            "ends": self._ends.state_dict(),
            "frames": {key: self._plain(entry, count) for key, entry in self._frames.items()} if count else {},
        }
        if self.prioritized is not None:
            # TorchRL's own `dumps` and `loads` go through the capacity in a Python loop.
            sampler = self._buffer.sampler.state_dict()
            priorities = sampler.pop("_sum_tree")[self._rows(count)]
            del sampler["_min_tree"]  # of stored frames it holds the same priorities
            state |= {"sampler": sampler, "priorities": priorities}
        try:
            torch.save(state, folder / "frames.pt")
        except RuntimeError as error:  # what PyTorch makes of a full disk
            raise OSError(f"cannot write {folder / 'frames.pt'}: {error}") from error

    def _rows(self, count: int) -> Tensor:
        return torch.arange(count, device=self._buffer.sampler.device)

    def _plain(self, entry: Tensor, count: int) -> Tensor:
        entry = entry.as_subclass(Tensor).cpu()
        # A view would be saved with all that it is a view of.
        return entry if count == self.capacity else entry[:count].clone()

    def load(self, folder: Path, row: TensorDict) -> None:
        """Continue from what `save` wrote, checked against an empty frame of this task.

        Raises:
            ReplayBufferError: the folder is missing, cut short, or of another task or capacity.
        """
        path = folder / "frames.pt"
        if not path.is_file():
            raise ReplayBufferError(f"ckpt_path: the checkpoint's replay buffer {path} is missing")
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise ReplayBufferError(f"ckpt_path: the replay buffer {path} is truncated ({error})") from error
        here = {key: (entry.shape, entry.dtype) for key, entry in row.items()}
        there = {key: (entry.shape[1:], entry.dtype) for key, entry in state["frames"].items()}
        if there and there != here:
            raise ReplayBufferError(
                f"ckpt_path: the replay buffer {path} is of another task: {there} there, {here} here"
            )
        for key in ("capacity", "num_envs"):
            if state[key] != getattr(self, key):
                raise ReplayBufferError(
                    f"ckpt_path: the replay buffer {path} has {key} {state[key]}, not {getattr(self, key)}"
                )
        if self.prioritized is not None and "priorities" not in state:
            raise ReplayBufferError(f"ckpt_path: the replay buffer {path} holds no priorities; sample uniformly")
        if state["frames"]:
            count = len(state["frames"]["reward"])
            self._buffer.extend(TensorDict(state["frames"], batch_size=[count]))
        self._cursor = self._buffer.writer._cursor = state["cursor"]
        self._newest = state["newest"]
        self._ends.load_state_dict(state["ends"])
        if self.prioritized is not None and state["frames"]:
            sampler = self._buffer.sampler.state_dict() | state["sampler"]
            for tree in (sampler["_sum_tree"], sampler["_min_tree"]):
                tree[self._rows(len(self))] = state["priorities"]
            self._buffer.sampler.load_state_dict(sampler)


class _Ends:
    """The last observation of every stored episode, numbered in the order of the episodes' ends."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None
        self._first, self._count = 0, 0  # number of the first row, and rows in use; those before are forgotten
        self._forgotten = 0

    def append(self, rows: Tensor) -> Tensor:
        """Store observations `[count, features]`; gives their numbers."""
        needed = self._count + len(rows)
        if self._rows is None or needed > len(self._rows):
            grown = rows.new_zeros(max(64, 2 * (needed - self._forgotten)), rows.shape[-1])
            if self._rows is not None:
                grown[: self._count - self._forgotten] = self._rows[self._forgotten : self._count]
            self._rows = grown
            self._first, self._count = self._first + self._forgotten, self._count - self._forgotten
            self._forgotten = 0
        self._rows[self._count : self._count + len(rows)] = rows
        start = self._first + self._count
        self._count += len(rows)
        return torch.arange(start, start + len(rows), dtype=torch.int32, device=rows.device)

    def forget(self, count: int) -> None:
        """The `count` oldest are needed no more."""
        self._forgotten += count

    def __getitem__(self, numbers: Tensor) -> Tensor:
        assert self._rows is not None
        return self._rows[numbers - self._first]

    def state_dict(self) -> dict[str, Any]:
        rows = None if self._rows is None else self._rows[: self._count].clone()
        return {"rows": rows, "first": self._first, "forgotten": self._forgotten}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rows, self._first, self._forgotten = state["rows"], state["first"], state["forgotten"]
        self._count = 0 if self._rows is None else len(self._rows)
