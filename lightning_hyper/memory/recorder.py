"""Cuts collected batches into completed episodes, which may begin in one batch and end in a later one."""

from __future__ import annotations

from typing import cast

import torch
from tensordict import TensorDict
from torch import Tensor

ENTRIES = ("observation", "task", "mission", "state_value")


class EpisodeRecorder:
    """Keeps the steps of unfinished episodes, and gives those of the completed ones.

    Args:
        horizon: most frames of an episode.
        gamma: discount per frame.

    Source: arXiv 2306.10698's code: an episode's value is its last reward, discounted back to each step.
    """

    def __init__(self, horizon: int, gamma: float) -> None:
        self.horizon, self.gamma = horizon, gamma
        self._pending: TensorDict | None = None  # [num_envs, horizon]
        self._lengths = torch.zeros(0, dtype=torch.int64)

    def completed(self, batch: TensorDict) -> TensorDict:
        """Steps `[N]` of the episodes that end in a batch, ordered by environment and time.

        Entries are those of `ENTRIES`, `value` (the last reward, discounted) and `episode_return` (that reward itself).

        Args:
            batch: entries `[num_envs, time, ...]`, among them `step_count` and what `next` says of reward and end.
        """
        done, reward = batch["next", "done"].squeeze(-1), batch["next", "reward"].squeeze(-1)
        n, steps = done.shape
        window = TensorDict({key: batch[key] for key in ENTRIES}, batch_size=[n, steps])
        if self._pending is None:
            self._pending = window[:, :1].expand(n, self.horizon).clone().zero_()
            self._lengths = torch.zeros(n, dtype=torch.int64, device=done.device)
        # Where the episode of each step ends: the first end at or after it; `steps` where it is still going on.
        time = torch.arange(steps, device=done.device).expand(n, steps)
        end = torch.where(done, time, steps).flip(1).cummin(1).values.flip(1)
        inside = end < steps
        before = torch.arange(self.horizon, device=done.device).expand(n, -1)
        carried = (before < self._lengths.unsqueeze(1)) & inside[:, :1]
        distance = torch.cat([self._lengths.unsqueeze(1) - before + end[:, :1], end - time], 1)
        last = reward.gather(1, end.clamp(max=steps - 1))
        last = torch.cat([last[:, :1].expand(n, self.horizon), last], 1)
        chosen = torch.cat([carried, inside], 1)
        entries = cast(TensorDict, torch.cat([self._pending, window], 1)[chosen])  # type: ignore[list-item]
        entries["value"] = (last * self.gamma**distance)[chosen]
        entries["episode_return"] = last[chosen]
        self._keep(window, batch["step_count"].squeeze(-1), inside, done)
        return entries

    def _keep(self, window: TensorDict, count: Tensor, inside: Tensor, done: Tensor) -> None:
        assert self._pending is not None
        rows, times = (~inside).nonzero(as_tuple=True)
        self._pending[rows, count[rows, times]] = window[rows, times]
        self._lengths = torch.where(done[:, -1], 0, count[:, -1] + 1)

    def state_dict(self) -> dict[str, object]:
        """Unfinished episodes."""
        if self._pending is None:
            return {}
        return {"pending": self._pending.clone().to_dict(), "lengths": self._lengths.clone()}

    def load_state_dict(self, state: dict[str, object], device: torch.device | None = None) -> None:
        """Continue from `state_dict`."""
        if state:
            assert isinstance(state["lengths"], Tensor)
            self._lengths = state["lengths"].to(device)
            self._pending = TensorDict(state["pending"], batch_size=[len(self._lengths), self.horizon]).to(device)
