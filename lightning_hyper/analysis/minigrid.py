"""What MiniGrid pays at random, and at best to one that sees the whole level.

`python -m lightning_hyper.analysis.minigrid twenty` prints both for each task of a set.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_hyper.envs.minigrid import SETS, MiniGrid
from lightning_hyper.envs.minigrid_batched import Levels
from lightning_hyper.envs.minigrid_package import ACTIONS, Task, describe
from lightning_hyper.envs.minigrid_rules import CELLS, MODES, covers, transitions
from lightning_hyper.experience.collection import first_episodes

__all__ = ["planner_returns", "random_returns", "shortest_plan"]


def random_returns(env: MiniGrid) -> np.ndarray:
    """Mean return of each task `[tasks]` under uniformly random actions: one episode of each of its environments."""
    ends = first_episodes(env, _Random(), deterministic=False)
    returns, task = ends["episode_return"].squeeze(-1), ends["task"]
    return np.array([float(returns[task == k].mean()) for k in range(len(env.tasks))])


class _Random:
    def act(self, step: Any, state: Tensor | None) -> tuple[dict[str, Tensor], Tensor | None]:
        return {"action": torch.randint_like(step["task"], ACTIONS)}, state


def planner_returns(task: str, levels: int = 60, seed: int = 0) -> np.ndarray:
    """Highest return of levels `[levels]` of a task, those numbered from 0 of environments with this seed; exact.

    No agent does better, and one that has to look for things first does worse.

    Raises:
        ValueError: the package has no such task, or the batched engine does not know its rules.
    """
    described = describe(task)
    returns = np.zeros(levels)
    for level in range(levels):
        actions = shortest_plan(described, level, seed)
        if actions is not None:
            returns[level] = 1 - 0.9 * len(actions) / described.max_steps
    return returns


def shortest_plan(task: Task, level: int, seed: int = 0) -> list[int] | None:
    """The fewest actions that bring success in a level within its steps; None where none do.

    Searches breadth first over all that a step may change: the cells, place and direction of the agent, what it
    carries, and how far it has come.

    Args:
        task: as `describe` gives it.
        level: number of the level, counted from 0.
        seed: of the environments that have it.

    Raises:
        ValueError: the batched engine does not know the task's rules.
    """
    if not covers(task):
        raise ValueError(f"{task.id} has rules of its own, which the planner does not know")
    levels = Levels([task], 1, lambda *_: 0, torch.device("cpu"))
    slot = int(levels.find(seed, torch.zeros(1, dtype=torch.int64), torch.tensor([level])))
    table = _Table(levels.stride)
    place, direction, mode, _ = levels.facts[slot].tolist()
    grids = levels.grids[slot].numpy()[None]
    agents = np.array([[place, direction, mode]])
    # A grid is told by the exclusive or of random numbers, one for each code in each cell, of those that changed.
    cells = np.random.default_rng(0).integers(2**63, size=(grids.shape[1], len(CELLS)), dtype=np.uint64)
    hashes = np.zeros(1, dtype=np.uint64)
    seen = table.keys(hashes, agents)
    taken: list[tuple[np.ndarray, np.ndarray]] = []
    for _ in range(task.max_steps):
        parents = np.repeat(np.arange(len(agents)), ACTIONS)
        actions = np.tile(np.arange(ACTIONS), len(agents))
        fronts, before, after, agents, success, over = table.step(grids, agents, parents, actions)
        if success.any():
            found = int(success.argmax())
            plan = [int(actions[found])]
            at = int(parents[found])
            for came_from, action in reversed(taken):
                plan.append(int(action[at]))
                at = int(came_from[at])
            return plan[::-1]
        hashes = hashes[parents] ^ cells[fronts, before] ^ cells[fronts, after]
        keys = table.keys(hashes, agents)
        _, new = np.unique(keys, return_index=True)
        new = new[~over[new]]
        new = new[~np.isin(keys[new], seen)]
        if len(new) == 0:
            return None
        seen = np.concatenate((seen, keys[new]))
        grids = grids[parents[new]]
        grids[np.arange(len(new)), fronts[new]] = after[new]
        agents, hashes = agents[new], hashes[new]
        taken.append((parents[new], actions[new]))
    return None


class _Table:
    """MiniGrid's rules on arrays of states, an agent being its cell, direction and mode `[K, 3]`."""

    def __init__(self, stride: int) -> None:
        self.forward = np.array([1, stride, -1, -stride])
        rules: Tensor = transitions()
        self.mode, self.turns = rules[:, 0].numpy(), rules[:, 1].numpy()
        self.success = rules.view(torch.float32)[:, 4].numpy() > 0
        packed = rules.view(torch.uint8)
        self.cell, self.moved, self.ended = (packed[:, column].numpy() for column in (20, 22, 23))

    def step(
        self, grids: np.ndarray, agents: np.ndarray, rows: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Cells ahead, their codes before and after, agents after, success and end, of actions in states `rows`."""
        place, direction, mode = agents[rows].T
        fronts = place + self.forward[direction]
        before = grids[rows, fronts]
        index = (actions * len(CELLS) + before) * len(MODES) + mode
        place = np.where(self.moved[index] > 0, fronts, place)
        after = np.stack((place, (direction + self.turns[index]) % 4, self.mode[index]), 1)
        return fronts, before, self.cell[index], after, self.success[index], self.ended[index] > 0

    def keys(self, hashes: np.ndarray, agents: np.ndarray) -> np.ndarray:
        """A number for each state, equal for equal ones."""
        place, direction, mode = agents.astype(np.uint64).T
        numbered: np.ndarray = (place * np.uint64(4) + direction) * np.uint64(len(MODES)) + mode
        return hashes ^ numbered * np.uint64(0x9E3779B97F4A7C15)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lightning_hyper.analysis.minigrid", description=__doc__)
    parser.add_argument("tasks", nargs="+", help=f"ids, or one of {', '.join(SETS)}")
    parser.add_argument("--episodes", type=int, default=200, help="episodes of each task at random")
    parser.add_argument("--levels", type=int, default=60, help="levels of each task for the planner")
    parser.add_argument("--seed", type=int, default=0, help="what levels and random actions are drawn with")
    given = parser.parse_args()
    tasks = SETS.get(given.tasks[0], tuple(given.tasks))
    try:
        unknown = [task for task in tasks if not covers(describe(task))]
    except ValueError as error:
        parser.error(str(error).replace("data.env.tasks", "tasks"))
    if unknown:
        parser.error(f"tasks: the rules of {', '.join(unknown)} are not known to the planner")
    torch.manual_seed(given.seed)
    env = MiniGrid(given.episodes * len(tasks), tasks=tasks)
    env.set_seed(given.seed)
    at_random, at_best = random_returns(env), []
    print(f"{'task':40} random planner")
    for task, low in zip(tasks, at_random, strict=True):
        at_best.append(planner_returns(task, given.levels, given.seed).mean())
        print(f"{task:40} {low:6.3f} {at_best[-1]:7.3f}", flush=True)
    print(f"{'mean':40} {at_random.mean():6.3f} {np.mean(at_best):7.3f}")


if __name__ == "__main__":
    main()
