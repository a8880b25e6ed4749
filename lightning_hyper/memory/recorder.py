"""Cuts collected batches into completed episodes, which may begin in one batch and end in a later one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from tensordict import TensorDict
from torch import Tensor

from lightning_hyper.checkpoint_file import EntryError


class EpisodeRecorder:
    """Keeps the steps of unfinished episodes, and gives those of the completed ones.

    What a step is worth is the discounted reward from it to its episode's end; where that was truncated, and
    `bootstrap` says so, with the critic's value of the last observation, as the critic's own targets have it.

    Args:
        gamma: discount per frame.
        entries: what is kept of each step.
        bootstrap: count the value of what follows a truncation.

    Source: arXiv 2306.10698's code, where an episode's value is its last and only reward, discounted to each step.
    """

    def __init__(self, gamma: float, entries: Sequence[str], *, bootstrap: bool = True) -> None:
        self.gamma, self.entries, self.bootstrap = gamma, tuple(entries), bootstrap
        self._pending: TensorDict | None = None  # [num_envs, longest so far], with the reward of each step
        self._lengths = torch.zeros(0, dtype=torch.int64)

    def completed(self, batch: TensorDict) -> TensorDict:
        """Steps `[N]` of the episodes that end in a batch, ordered by environment and time.

        Entries are those kept, `value` and `episode_return` (undiscounted).

        Args:
            batch: entries `[num_envs, time, ...]`, among them `step_count`, `next_value`, and what `next` says of
                reward and end.
        """
        after = batch["next"]
        done, terminated, reward = (after[key].squeeze(-1) for key in ("done", "terminated", "reward"))
        n, steps = done.shape
        window = TensorDict({**{key: batch[key] for key in self.entries}, "reward": reward}, batch_size=[n, steps])
        if self._pending is None:
            self._pending = window.clone().zero_()
            self._lengths = torch.zeros(n, dtype=torch.int64, device=done.device)
        # Where the episode of each step ends: the first end at or after it; `steps` where it is still going on.
        time = torch.arange(steps, device=done.device).expand(n, steps)
        end = torch.where(done, time, steps).flip(1).cummin(1).values.flip(1)
        inside = end < steps
        early = self._pending.shape[1]
        before = torch.arange(early, device=done.device).expand(n, -1)
        carried = (before < self._lengths.unsqueeze(1)) & inside[:, :1]
        last = batch["next_value"].squeeze(-1) * ~terminated if self.bootstrap else torch.zeros_like(reward)
        value = self._values(reward, done, last)
        total = after["episode_return"].squeeze(-1).gather(1, end.clamp(max=steps - 1))
        total = torch.cat([total[:, :1].expand(n, early), total], 1)
        chosen = torch.cat([carried, inside], 1)
        entries = cast(TensorDict, torch.cat([self._pending, window], 1)[chosen])  # type: ignore[list-item]
        del entries["reward"]
        entries["value"], entries["episode_return"] = value[chosen], total[chosen]
        self._keep(window, batch["step_count"].squeeze(-1), inside, done)
        return entries

    def _values(self, reward: Tensor, done: Tensor, last: Tensor) -> Tensor:
        """Discounted rewards `[num_envs, longest + time]` up to the first end; meaningless where there is none."""
        assert self._pending is not None
        values, following = [], torch.zeros_like(reward[:, 0])
        for t in range(reward.shape[1] - 1, -1, -1):
            following = reward[:, t] + self.gamma * torch.where(done[:, t], last[:, t], following)
            values.append(following)
        pending, longest = self._pending["reward"], int(self._lengths.max())
        early = torch.zeros_like(pending)
        for k in range(longest - 1, -1, -1):
            # Environments whose pending episode is shorter wait for their own last step.
            following = torch.where(k < self._lengths, pending[:, k] + self.gamma * following, following)
            early[:, k] = following
        return torch.cat([early, torch.stack(values[::-1], 1)], 1)

    def _keep(self, window: TensorDict, count: Tensor, inside: Tensor, done: Tensor) -> None:
        assert self._pending is not None
        rows, times = (~inside).nonzero(as_tuple=True)
        longest, width = int(count.max()) + 1, self._pending.shape[1]
        if longest > width:
            more = self._pending[:, :1].expand(len(count), max(longest, 2 * width) - width).clone().zero_()
            self._pending = cast(TensorDict, torch.cat([self._pending, more], 1))  # type: ignore[list-item]
        self._pending[rows, count[rows, times]] = window[rows, times]
        self._lengths = torch.where(done[:, -1], 0, count[:, -1] + 1)

    def save_state(self) -> dict[str, Any]:
        """Unfinished episodes, as plain tensors."""
        if self._pending is None:
            return {}
        return {"pending": self._pending.clone().to_dict(), "lengths": self._lengths.clone()}

    def load_state(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        """Continue from `save_state`.

        Raises:
            EntryError: the state is not one of this agent's episodes; names what differs.
        """
        if state:
            lengths, pending = state["lengths"], state["pending"]
            for key in dict.fromkeys([*self.entries, "reward", *pending]):
                if key not in pending or key not in (*self.entries, "reward"):
                    raise EntryError("is missing, or not of this agent", "pending", key)
                if pending[key].shape[:2] != (len(lengths), pending["reward"].shape[1]):
                    raise EntryError(f"is a tensor of {tuple(pending[key].shape)}", "pending", key)
            if lengths.dtype != torch.int64 or not 0 <= lengths.min() <= lengths.max() <= pending["reward"].shape[1]:
                raise EntryError("are no lengths of episodes", "lengths")
            self._lengths = lengths.to(device)
            self._pending = TensorDict(pending, batch_size=pending["reward"].shape).to(device)
