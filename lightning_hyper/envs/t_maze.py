"""T-maze: remember a cue along a corridor of any length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_hyper.checks import Count, NonNegative, checked
from lightning_hyper.envs.base import BatchedEnv

WIDE = 2.0  # of a map, on which a branch is 1 long


class TMaze(BatchedEnv):
    """A batch of T-mazes: a cue is shown once, then a corridor, and at its end the branch is right that the cue named.

    Actions: right, up, left, down; the branches lead up and down. The observation is (whether at the corridor's end,
    y), and at the first step (0, cue), 1 for up and -1 for down; the cue is the task. An episode always lasts
    `length + 1` frames and then terminates: the last pays 1 in the cue's branch, each other one `-penalty / length`
    where the agent has not gone right at every frame so far. The optimum is 1; without memory 0.5.

    Args:
        num_envs: episodes stepped side by side.
        length: frames from the cue to the corridor's end, which a memory must bridge.
        penalty: paid over an episode by an agent that stays where it is; 0 as in the original, which is hard to
            explore.
        device: where the tensors live.

    Raises:
        RecipeError: a count or number out of range.

    Source: Bakker 2001 (NeurIPS, "Reinforcement learning with long short-term memory"), as the passive T-maze of Ni et
    al. 2023 (arXiv 2307.03864).
    """

    MOVES = ((1, 0), (0, 1), (-1, 0), (0, -1))

    @checked
    def __init__(
        self, num_envs: Count = 64, *, length: Count = 10, penalty: NonNegative = 1.0, device: str = "cpu"
    ) -> None:
        super().__init__(num_envs, device)
        self.length, self.horizon, self.penalty = length, length + 1, penalty
        self._moves = torch.tensor(self.MOVES, device=self.device)
        self._cue = torch.ones(num_envs, 1, device=self.device)
        self._position = torch.zeros(num_envs, 2, device=self.device, dtype=torch.int64)
        self._make_specs((2,), len(self.MOVES), task_features=1)

    def draw_tasks(self, rows: Tensor) -> None:
        chosen = 1.0 - 2 * self.chosen_tasks(2).unsqueeze(-1)
        self._cue = torch.where(rows.unsqueeze(-1), chosen, self._cue)

    def start(self, rows: Tensor) -> None:
        self._position = self._position.masked_fill(rows.unsqueeze(-1), 0)

    def observation(self) -> Tensor:
        return torch.cat((torch.zeros_like(self._cue), self._cue), -1)

    def simulate(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        frame = cast(dict[str, Tensor], self.current)["step_count"].squeeze(-1) + 1
        moved = self._position + self._moves[action]
        x, y = moved.unbind(-1)
        free = torch.where(y == 0, (x >= 0) & (x <= self.length), (x == self.length) & (y.abs() == 1))
        self._position = torch.where(free.unsqueeze(-1), moved, self._position)
        x, y = self._position.unbind(-1)
        last = frame >= self.horizon
        late = -self.penalty / self.length * (x < frame)
        shown = torch.stack((x == self.length, y), -1).float()
        return shown, torch.where(last, (y == self._cue.squeeze(-1)).float(), late), last

    def entries(self) -> dict[str, Tensor]:
        return {"task": self._cue}

    def places(self) -> NDArray[Any]:
        where: NDArray[Any] = self._position[:1].cpu().numpy() * (WIDE / self.length, 1)
        return where

    def draw_map(self, axes: Any) -> None:
        for x, y in (((0, WIDE), (0, 0)), ((WIDE, WIDE), (-1, 1))):
            axes.plot(x, y, color="#DDDDDD", linewidth=12, zorder=0, solid_capstyle="round")
        axes.plot(WIDE, float(self._cue[0]), marker="*", color="#D55E00", markersize=16, zorder=0)
        axes.set(xlim=(-0.5, WIDE + 0.5), ylim=(-1.5, 1.5), yticks=())
        axes.set_xticks((0, WIDE), (0, self.length))

    def snapshot(self) -> dict[str, Any]:
        return {"cue": self._cue.clone(), "position": self._position.clone()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._cue, self._position = (state[name].to(self.device, copy=True) for name in ("cue", "position"))
