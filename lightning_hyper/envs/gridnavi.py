"""GridNavi: find an unseen goal in a small grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_hyper.checks import Count, Range, checked
from lightning_hyper.envs.base import BatchedEnv


class GridNavi(BatchedEnv):
    """A batch of grid worlds with a hidden goal each, which is the task; `Trials` returns to it in every episode.

    The agent starts in the corner (0, 0); the goal is uniform over the cells outside the start's 3x3 neighbourhood.
    Actions: stay, up, right, down, left. The observation is the cell (x, y), unscaled. It never terminates.

    Args:
        num_envs: episodes stepped side by side.
        episode_steps: frames after which an episode is truncated.
        size: cells along a side, at least 3.
        reward: `sparse` gives +1 on the goal and -0.1 elsewhere; `dense` gives minus the Manhattan distance over
            `size` elsewhere.
        show_goal: `never`; `episode_start` shows the goal's cell in place of the agent's at the first step of an
            episode (as the paper describes it; in `Trials`, with `boundary` `first`); `start_cell` does so whenever a
            frame ends on the start cell (as the published code does it, with `boundary` `last`).
        device: where the tensors live.

    Attributes:
        goals: cells that may be the goal, `[goals, 2]`.

    Raises:
        RecipeError: a size, count or name out of range.

    Source: Beck et al. 2023 (arXiv 2309.14970), grid worlds; after Zintgraf et al. 2020 (VariBAD).
    """

    MOVES = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))

    @checked
    def __init__(
        self,
        num_envs: Count = 256,
        *,
        episode_steps: Count = 15,
        size: Annotated[int, Range(3, 1_000)] = 5,
        reward: Literal["sparse", "dense"] = "sparse",
        show_goal: Literal["never", "episode_start", "start_cell"] = "never",
        device: str = "cpu",
    ) -> None:
        super().__init__(num_envs, device)
        self.horizon = self.episode_steps = episode_steps
        self.size, self.reward, self.show_goal = size, reward, show_goal
        self._moves = torch.tensor(self.MOVES, device=self.device)
        cells = [(x, y) for x in range(size) for y in range(size) if x > 1 or y > 1]
        self.goals = torch.tensor(cells, device=self.device)
        self._goal = self.goals[:1].float().expand(num_envs, 2)
        self._position = torch.zeros(num_envs, 2, device=self.device, dtype=torch.int64)
        self._make_specs((2,), len(self.MOVES), task_features=2)

    def draw_tasks(self, rows: Tensor) -> None:
        chosen = self.goals[self.chosen_tasks(len(self.goals))].float()
        self._goal = torch.where(rows.unsqueeze(-1), chosen, self._goal)

    def start(self, rows: Tensor) -> None:
        self._position = self._position.masked_fill(rows.unsqueeze(-1), 0)

    def observation(self) -> Tensor:
        return self._goal if self.show_goal == "episode_start" else self._position.float()

    def simulate(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._position = (self._position + self._moves[action]).clamp_(0, self.size - 1)
        cell = self._position.float()
        distance = (cell - self._goal).abs_().sum(-1)
        miss = -distance / self.size if self.reward == "dense" else -0.1
        reward = torch.where(distance == 0, 1.0, miss)
        if self.show_goal == "start_cell":
            cell = torch.where((cell == 0).all(-1, keepdim=True), self._goal, cell)
        return cell, reward, torch.zeros_like(distance, dtype=torch.bool)

    def entries(self) -> dict[str, Tensor]:
        return {"task": self._goal}

    def places(self) -> NDArray[Any]:
        return self._position[:1].cpu().numpy()

    def draw_map(self, axes: Any) -> None:
        axes.plot(*self._goal[0].tolist(), marker="*", color="#D55E00", markersize=16, zorder=0)
        axes.set(xlim=(-0.5, self.size - 0.5), ylim=(-0.5, self.size - 0.5), aspect="equal")
        for set_ticks in (axes.set_xticks, axes.set_yticks):
            set_ticks([k - 0.5 for k in range(self.size + 1)], [])
        axes.grid(color="#DDDDDD")

    def snapshot(self) -> dict[str, Any]:
        return {"goal": self._goal.clone(), "position": self._position.clone()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._goal, self._position = (state[name].to(self.device, copy=True) for name in ("goal", "position"))
