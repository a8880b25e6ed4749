"""What GridNavi pays at random, at best, and to one that is told the goal; exact."""

from __future__ import annotations

import heapq
from typing import cast

import numpy as np
from numpy.typing import NDArray

from lightning_hyper.envs import GridNavi, Trials

MISS, HIT = -0.1, 1.0
LARGEST = 7  # cells along a side of which all cells seen, and the one stood on, are one number of 64 bits

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def random_returns(env: Trials) -> Floats:
    """Expected return of each episode `[episodes]` under uniformly random actions, by the Markov chain.

    Args:
        env: trials of GridNavi, as in the next two.

    Raises:
        ValueError: the reward is not the sparse one.
    """
    grid = _grid(env)
    step = np.zeros((grid.size**2, grid.size**2))
    for cell, following in enumerate(_neighbours(grid)):
        np.add.at(step[cell], following, 1 / len(following))
    where = np.zeros(grid.size**2)
    where[0] = 1.0
    total = 0.0
    for _ in range(grid.episode_steps):
        where = where @ step
        total += float(where[_goals(grid)].mean())
    return np.full(env.episodes, HIT * total + MISS * (grid.episode_steps - total))


def told_returns(env: Trials) -> Floats:
    """Expected return of each episode `[episodes]` for one that is told the goal: walk straight there and stay.

    No policy does better in any episode.

    Raises:
        ValueError: the reward is not the sparse one.
    """
    return np.full(env.episodes, _worth(_grid(env)).mean())


def optimal_returns(env: Trials) -> Floats:
    """Expected return of each episode `[episodes]` of the best policy that is not told the goal.

    It walks until the goal pays, stays there, and goes straight to it in later episodes; which walk is best is found by
    dynamic programming over (cell, cells seen) within an episode, and between episodes by searching best first, with
    `told_returns` as the bound of what may come. A second for the paper's trials, whose best is 4 in the first
    episode and what one that is told gets in the others; minutes for some others.

    Raises:
        ValueError: as above, or a grid of more than 7 x 7 cells.
    """
    grid = _grid(env)
    if grid.size > LARGEST:
        raise ValueError(f"data.env.size is {grid.size}; the optimum is found for at most {LARGEST}")
    worth = _worth(grid)
    told = float(worth.mean())
    # The bound, negative; episodes over, negative so that of equals the one that has come furthest goes first.
    waiting: list[tuple[float, int, int, tuple[float, ...]]] = [(-told * env.episodes, 0, 0, ())]
    while True:
        _, over, seen, returns = heapq.heappop(waiting)
        if -over == env.episodes:
            return np.array(returns)
        known = float(worth[[bool(seen >> goal & 1) for goal in range(len(worth))]].sum())
        sets, gains = _episode(grid, seen)
        to_come = told * (env.episodes + over - 1)
        for now, gain in zip(sets.tolist(), ((known + gains) / len(worth)).tolist(), strict=True):
            total = sum(returns) + gain
            heapq.heappush(waiting, (-total - to_come, over - 1, now, (*returns, gain)))


def _episode(grid: GridNavi, seen: int) -> tuple[Integers, Floats]:
    """What an episode may come to: sets of goals seen after it `[sets]`, each a number of bits, and the most it pays.

    Args:
        grid: the environment.
        seen: goals seen before it.

    Returns:
        the sets, and `[sets]` the sum over all goals not seen before of what the episode pays if it is that one.
    """
    cells, neighbours = grid.size**2, _neighbours(grid)
    bit = np.zeros(cells, dtype=np.int64)
    bit[_goals(grid)] = 1 << np.arange(len(grid.goals))
    # States as numbers, seen * cells + cell.
    states, most = np.array([seen * cells]), np.zeros(1)
    for left in range(grid.episode_steps, 0, -1):
        following = neighbours[states % cells]
        before = (states // cells)[:, None]
        after = before | bit[following]
        unseen = len(grid.goals) - np.bitwise_count(after)
        gain = HIT * left * (after != before) + MISS * unseen  # found now: it pays for the rest of the episode
        states, most = _best((after * cells + following).ravel(), (most[:, None] + gain).ravel())
    return _best(states // cells, most)


def _best(names: Integers, values: Floats) -> tuple[Integers, Floats]:
    """The distinct names, each with its largest value."""
    order = np.lexsort((-values, names))
    names, values = names[order], values[order]
    first = np.append(True, names[1:] != names[:-1])
    return names[first], values[first]


def _grid(env: Trials) -> GridNavi:
    grid = cast(GridNavi, env.inner)
    if grid.reward != "sparse":
        raise ValueError(f"data.env.reward is {grid.reward!r}; what GridNavi pays is computed for 'sparse'")
    return grid


def _goals(grid: GridNavi) -> Integers:
    """Cells that may be the goal, as numbers `[goals]`."""
    goals: Integers = grid.goals.cpu().numpy() @ np.array([grid.size, 1])
    return goals


def _worth(grid: GridNavi) -> Floats:
    """Return of an episode that walks straight to each goal and stays, `[goals]`."""
    steps = grid.goals.cpu().numpy().sum(1)
    hits = np.maximum(0, grid.episode_steps - steps + 1)
    returns: Floats = HIT * hits + MISS * (grid.episode_steps - hits)
    return returns


def _neighbours(grid: GridNavi) -> Integers:
    """The cell that each action leads to from each cell, `[cells, actions]`."""
    places = np.stack(np.divmod(np.arange(grid.size**2), grid.size), 1)
    there = np.clip(places[:, None] + np.array(grid.MOVES), 0, grid.size - 1)
    numbers: Integers = there @ np.array([grid.size, 1])
    return numbers
