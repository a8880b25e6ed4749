"""MiniGrid in tensors: a step of all environments, of whatever task, is a few look-ups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from minigrid.minigrid_env import MiniGridEnv
from torch import Tensor

from lightning_hyper.checks import RecipeError
from lightning_hyper.envs.minigrid_package import VIEW, Engine, Task, begin, level_seed
from lightning_hyper.envs.minigrid_rules import (
    BOXED,
    CELLS,
    CLEAR,
    FAR,
    HANDS,
    MODE,
    MODES,
    NEAR,
    NOTHING,
    RULES,
    WALL_CODE,
    encode,
    meanings,
    sight,
    transitions,
)

# Cells of padding around the grids, as far as an agent sees.
REACH_OF_VIEW = VIEW - 1
# Gathers the lowest bit of each of a word's eight bytes in its highest byte.
GATHER_BITS, HIGHEST_BYTE = 0x0102040810204080, 56


class Levels:
    """The package's levels, each made when it is first drawn and kept until a later one takes its place.

    Args:
        tasks: the tasks.
        count: levels kept of each task.
        mission_index: index of the mission that one of the package's environments, of the task given, is on.
        device: where the levels are kept.

    Attributes:
        stride: cells from one row of a grid to the next; rows share the padding between them.
        grids: `[tasks * count, cells]`, uint8, codes of the cells with walls around.
        facts: `[tasks * count, 4]`: the agent's cell and direction, mode, mission.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        count: int,
        mission_index: Callable[[int, MiniGridEnv], int],
        device: torch.device,
    ) -> None:
        self.count, self.mission_index, self.seed = count, mission_index, 0
        self.envs = [task.make() for task in tasks]
        self.names = [task.id for task in tasks]
        width, height = (max(getattr(env, side) for env in self.envs) for side in ("width", "height"))
        self.stride, self.rows = width + REACH_OF_VIEW, height + 2 * REACH_OF_VIEW
        slots = len(tasks) * count
        self.grids = torch.empty(slots, self.rows * self.stride + REACH_OF_VIEW, dtype=torch.uint8, device=device)
        self.facts = torch.zeros(slots, 4, dtype=torch.int64, device=device)
        self._held = np.full(slots, -1)

    def find(self, seed: int, tasks: Tensor, levels: Tensor) -> Tensor:
        """Where levels `[K]` of tasks `[K]`, made with this seed, are kept; all on the CPU."""
        if seed != self.seed:
            self.seed = seed
            self._held.fill(-1)
        slots, wanted = (tasks * self.count + levels % self.count).numpy(), levels.numpy()
        for i in (self._held[slots] != wanted).nonzero()[0]:
            slot = slots[i]
            if self._held[slot] != wanted[i]:
                self._make(int(tasks[i]), int(slot), int(wanted[i]))
        return torch.from_numpy(slots)

    def _make(self, task: int, slot: int, level: int) -> None:
        env = self.envs[task]
        begin(env, level_seed(self.seed, level))
        rule = RULES[type(env).step]
        x, y = map(int, env.agent_pos)
        meaning = meanings(env, rule)
        codes = np.full((self.rows, self.stride), WALL_CODE, dtype=np.uint8)
        inner = codes[REACH_OF_VIEW : REACH_OF_VIEW + env.height, REACH_OF_VIEW : REACH_OF_VIEW + env.width]
        try:
            inner[:] = encode(env, meaning)
            if rule == FAR and meaning.get((x, y)):
                rule = NEAR
            if BOXED[0] not in HANDS[rule] and np.isin(inner, BOXED).any():
                raise KeyError("a box with a key")
        except KeyError as error:
            raise RecipeError(
                f"data.env.engine: the batched engine does not know {error} in a level of {self.names[task]}; set "
                "data.env.engine to minigrid"
            ) from None
        tail = np.full(REACH_OF_VIEW, WALL_CODE, dtype=np.uint8)
        self.grids[slot] = torch.from_numpy(np.concatenate((codes.reshape(-1), tail)))
        place = (y + REACH_OF_VIEW) * self.stride + x + REACH_OF_VIEW
        facts = (place, int(env.agent_dir), MODE[rule, NOTHING], self.mission_index(task, env))
        self.facts[slot] = torch.tensor(facts)
        self._held[slot] = level


class BatchedEngine(Engine):
    """All environments in a few tensor operations; see `Engine` for the other arguments.

    Args:
        levels: levels kept of each task.
        device: where the tensors live.
    """

    def __init__(self, tasks: Sequence[Task], task: Tensor, levels: int, device: torch.device) -> None:
        super().__init__(tasks, task)
        num_envs = self.num_envs
        self.levels = Levels(self.tasks, levels, self.mission_index, device)
        self.device, self._cells = device, self.levels.grids.shape[1]

        def per_env(values: list[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[task.to(device)]

        # The package's own formula for each frame, and where each environment's first and last frame lie in it.
        limits = [task.max_steps for task in self.tasks]
        rewards = [1 - 0.9 * (step / limit) for limit in limits for step in range(limit + 1)]
        ends = torch.tensor(limits).add(1).cumsum(0)
        self._rewards = torch.tensor(rewards, dtype=torch.float64).float().to(device)
        self._first = per_env([0, *ends[:-1].tolist()], torch.int64)
        self._last = per_env((ends - 1).tolist(), torch.int64)
        # Codes from here on hide what is behind them; where agents see through walls, none does.
        hiding = [len(CELLS) if env.see_through_walls else len(CLEAR) for env in self.levels.envs]
        self._hiding = per_env(hiding, torch.uint8).unsqueeze(1)
        self._base = torch.arange(num_envs, device=device) * self._cells
        self._grid = torch.full((num_envs * self._cells,), NOTHING, dtype=torch.uint8, device=device)
        self._tables(device)
        count = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self.image = torch.zeros(num_envs, VIEW, VIEW, 3, dtype=torch.uint8, device=device)
        self.direction, self.mission, self._frame, self._where = count, count, self._first, self._base
        self._front, self._level = count.clone(), torch.zeros(num_envs, dtype=torch.int64)
        self._mode, self._ahead = count, count.to(torch.uint8)

    def _tables(self, device: torch.device) -> None:
        self._transitions = transitions().to(device)
        self._spread, self._seen = (table.to(device) for table in sight())
        self._carried = torch.tensor([hand for _, hand in MODES], dtype=torch.uint8, device=device)
        # Four bytes, since a number is looked up faster than three are.
        encoded = torch.tensor([[*cell[:3], 0] for cell in CELLS], dtype=torch.uint8)
        self._encoded = encoded.view(torch.int32).flatten().to(device)
        stride = self.levels.stride
        forward = torch.tensor([1, stride, -1, -stride])
        ahead = torch.arange(VIEW - 1, -1, -1).view(-1, 1, 1) * forward.view(1, -1, 1)
        # The eighth of a row is there to fill a word, and as the agent's own cell it hides nothing.
        aside = torch.arange(VIEW + 1).sub(VIEW // 2).view(1, 1, -1) * forward.roll(-1).view(1, -1, 1)
        views = ahead + aside
        views[..., -1] = 0
        self._views = views.to(device)

    @property
    def steps(self) -> Tensor:  # type: ignore[override]
        return self._frame - self._first

    def _look(self, where: Tensor, direction: Tensor, carried: Tensor, hiding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images `[K, 7, 7, 3]`, and the cell ahead: its place and its code, both `[K]`."""
        n = len(where)
        # Cells by row, environment and column, a row of eight to a word. Where environments are few, calls are what
        # costs, so none is spent on slices, and nothing is of two types that a call would first convert.
        places = self._views.index_select(1, direction).add_(where.unsqueeze(1))
        codes = self._grid.gather(0, places.view(-1)).view(VIEW, n, VIEW + 1)
        opaque = (codes >= hiding).view(torch.int64).view(VIEW, n)
        keys = opaque.mul_(GATHER_BITS).bitwise_right_shift_(HIGHEST_BYTE)
        # A key is what was reached of a row and what is opaque in it; the agent's row is reached at the agent.
        rows = keys.unbind(0)
        rows[-1].add_(128 << VIEW // 2)
        for near, far in pairwise(reversed(rows)):
            far.add_(self._spread.index_select(0, near))
        seen = self._seen.index_select(0, keys.view(-1)).bitwise_and_(codes.view(torch.int64).view(-1))
        shown = seen.view(torch.uint8).view(VIEW, n, VIEW + 1)
        shown.select(0, -1).select(1, VIEW // 2).copy_(carried)
        by_column = shown.permute(1, 2, 0).narrow(1, 0, VIEW).to(torch.int64, memory_format=torch.contiguous_format)
        image = self._encoded.index_select(0, by_column.view(-1)).view(torch.uint8).view(n, VIEW, VIEW, 4)
        front, ahead = (cells.select(0, -2).select(1, VIEW // 2) for cells in (places, codes))
        return image.narrow(3, 0, 3), front, ahead

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key = torch.add(self._ahead, action, alpha=len(CELLS))
        after = self._transitions.index_select(0, torch.add(self._mode, key, alpha=len(MODES)))
        self._mode, turns, _ = after.unbind(1)
        success = after.view(torch.float32).select(1, 4)
        ahead, carried, moved, ended = after.view(torch.uint8).narrow(1, 20, 4).unbind(1)
        self._grid.scatter_(0, self._front, ahead)
        self.direction = self.direction.add(turns).bitwise_and_(3)
        self._where = torch.where(moved.view(torch.bool), self._front, self._where)
        self._frame = torch.minimum(self._frame.add(1), self._last)
        reward = self._rewards.index_select(0, self._frame).mul_(success)
        self.image, self._front, self._ahead = self._look(self._where, self.direction, carried, self._hiding)
        return reward, ended.bool(), self._frame == self._last

    def start(self, rows: Tensor, levels: Tensor) -> None:
        self._level[rows] = levels
        slots = self.levels.find(self.seed, self.task[rows], levels).to(self.device)
        rows = rows.to(self.device)
        place, direction, mode, mission = self.levels.facts.index_select(0, slots).unbind(1)
        self._grid.view(-1, self._cells).index_copy_(0, rows, self.levels.grids.index_select(0, slots))
        # Entries that have been given away are replaced, not changed.
        self.direction = self.direction.index_copy(0, rows, direction)
        self.mission = self.mission.index_copy(0, rows, mission)
        self._frame = self._frame.index_copy(0, rows, self._first.index_select(0, rows))
        self._where = self._where.index_copy(0, rows, place + self._base.index_select(0, rows))
        self._mode = self._mode.index_copy(0, rows, mode)
        self._see(rows)

    def _see(self, rows: Tensor) -> None:
        where, direction, mode, hiding = (
            entry.index_select(0, rows) for entry in (self._where, self.direction, self._mode, self._hiding)
        )
        image, front, ahead = self._look(where, direction, self._carried.index_select(0, mode), hiding)
        self.image = self.image.index_copy(0, rows, image)
        self._front = self._front.index_copy(0, rows, front)
        self._ahead = self._ahead.index_copy(0, rows, ahead)

    def save_state(self) -> dict[str, Tensor]:
        kept = {"level": self._level, "grid": self._grid, "where": self._where, "direction": self.direction}
        kept |= {"mode": self._mode, "mission": self.mission, "frame": self._frame}
        return {name: tensor.clone() for name, tensor in kept.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._level = state["level"].cpu().clone()
        kept = ("grid", "where", "direction", "mode", "mission", "frame")
        moved = (state[name].to(self.device, copy=True) for name in kept)
        self._grid, self._where, self.direction, self._mode, self.mission, self._frame = moved
        self._see(torch.arange(self.num_envs, device=self.device))
