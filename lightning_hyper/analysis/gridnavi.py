"""What GridNavi pays at best and at random, computed, and pictures of a trial in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lightning_hyper.agent import Agent
    from lightning_hyper.envs import GridNavi

MISS, HIT = -0.1, 1.0


def random_returns(env: GridNavi) -> np.ndarray:
    """Expected return of each episode `[episodes]` under uniformly random actions; exact, by the Markov chain.

    Raises:
        ValueError: the reward is not the sparse one.
    """
    step = _transition(env)
    where = np.zeros(env.size**2)
    where[0] = 1.0
    total = 0.0
    for _ in range(env.episode_steps):
        where = where @ step
        total += float(where[_goals(env)].mean())
    return np.full(env.episodes, HIT * total + MISS * (env.episode_steps - total))


def told_returns(env: GridNavi) -> np.ndarray:
    """Expected return of each episode `[episodes]` for one that is told the goal: walk straight there and stay; exact.

    No policy does better in any episode.
    """
    return np.full(env.episodes, np.mean([_return_after(env, _distance(env, goal)) for goal in _goals(env)]))


def explorer_returns(env: GridNavi, *, beam: int = 4000) -> np.ndarray:
    """Expected return of each episode `[episodes]` for the best explorer found: walk until the goal pays, then keep it.

    The walk is chosen by a beam search over (cell, cells seen) that keeps the `beam` most valuable partial walks, so
    that this is what some policy attains, and at least almost what the best one does.
    """
    goals = _goals(env)
    bit = {goal: 1 << i for i, goal in enumerate(goals)}
    known = float(np.mean([_return_after(env, _distance(env, goal)) for goal in goals]))
    neighbours = [np.flatnonzero(row).tolist() for row in _transition(env)]
    n, worth = len(goals), {g: _return_after(env, _distance(env, g)) for g in goals}
    # (cell, seen) -> (value of the whole trial so far, returns of each episode so far)
    states: dict[tuple[int, int], tuple[float, tuple[float, ...]]] = {(0, 0): (0.0, (0.0,) * env.episodes)}
    for episode in range(env.episodes):
        states = _restart(states)
        for t in range(env.episode_steps):
            following: dict[tuple[int, int], tuple[float, tuple[float, ...]]] = {}
            left = env.episode_steps - t
            for (cell, seen), (value, returns) in states.items():
                for nxt in neighbours[cell]:
                    gain, now = 0.0, seen
                    later = 0.0
                    missing = n - seen.bit_count()
                    if nxt in bit and not seen & bit[nxt]:
                        now = seen | bit[nxt]
                        gain += HIT * left  # found at this step: stay for the rest of the episode
                        later = worth[nxt]
                        missing -= 1
                    gain += MISS * missing
                    total = value + (gain + later * (env.episodes - episode - 1)) / n
                    if (nxt, now) not in following or total > following[nxt, now][0]:
                        split = list(returns)
                        split[episode] += gain / n
                        for k in range(episode + 1, env.episodes):
                            split[k] += later / n
                        following[nxt, now] = (total, tuple(split))
            # What is not yet seen still costs; a walk that has seen more is the better bet at equal value.
            order = sorted(following, key=lambda s: following[s][0] + known * s[1].bit_count() / n, reverse=True)
            states = {key: following[key] for key in order[:beam]}
    return np.array(max(states.values())[1])


def _restart(
    states: dict[tuple[int, int], tuple[float, tuple[float, ...]]],
) -> dict[tuple[int, int], tuple[float, tuple[float, ...]]]:
    best: dict[tuple[int, int], tuple[float, tuple[float, ...]]] = {}
    for (_, seen), entry in states.items():
        best[0, seen] = max(best.get((0, seen), entry), entry)
    return best


def _goals(env: GridNavi) -> list[int]:
    if env.reward != "sparse":
        raise ValueError(f"references are computed for GridNavi's sparse reward; this one is {env.reward!r}")
    return [x * env.size + y for x, y in env.goals.tolist()]


def _distance(env: GridNavi, cell: int) -> int:
    return cell // env.size + cell % env.size


def _return_after(env: GridNavi, steps: int) -> float:
    """Return of an episode that reaches the goal with its `steps`-th move and stays."""
    hits = max(0, env.episode_steps - steps + 1)
    return HIT * hits + MISS * (env.episode_steps - hits)


def _transition(env: GridNavi) -> np.ndarray:
    """Probability of each next cell under a uniformly random action, `[cells, cells]`."""
    size = env.size
    step = np.zeros((size**2, size**2))
    for cell in range(size**2):
        for dx, dy in env.MOVES:
            x, y = np.clip((cell // size + dx, cell % size + dy), 0, size - 1)
            step[cell, x * size + y] += 1 / len(env.MOVES)
    return step


def draw_trial(agent: Agent, env: GridNavi, *, seed: int = 0) -> Any:
    """A figure of one trial, an arrow path per episode, by an agent acting in the plain loop."""
    from matplotlib.figure import Figure

    env.set_seed(seed)
    step = env.reset()
    goal = step["task"][0].tolist()
    agent.reset(task=goal)
    figure = Figure(figsize=(2.4 * env.episodes, 2.9), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, env.episodes))
    reward, done = 0.0, False
    for k, axis in enumerate(axes):
        cells, total = [(0, 0)], 0.0
        for _ in range(env.episode_steps):
            step["action"] = env.action_spec.zero() + int(agent.act(step["observation"][0].numpy(), reward, done))
            step = env.step(step)["next"]
            reward, done = float(step["reward"][0]), bool(step["episode_done"][0])
            total += reward
            cells.append(tuple(step["observation"][0].tolist()))
        path = np.array(cells) + np.linspace(-0.15, 0.15, len(cells))[:, None]  # apart, so that returns show
        axis.plot(*path.T, color="#0072B2", linewidth=1.5, marker="o", markersize=3)
        axis.plot(*path[0], marker="o", color="#0072B2", markersize=9, fillstyle="none")
        axis.plot(*goal, marker="*", color="#D55E00", markersize=16, zorder=0)
        axis.set(title=f"episode {k + 1}: {total:.1f}", xlim=(-0.5, env.size - 0.5), ylim=(-0.5, env.size - 0.5))
        axis.set_aspect("equal")
        axis.set_xticks(np.arange(-0.5, env.size), [])
        axis.set_yticks(np.arange(-0.5, env.size), [])
        axis.grid(color="#DDDDDD")
    return figure
