"""What GridNavi pays at random, told and at best, against policies that are played and beliefs worked through."""

from functools import cache, partial

import numpy as np
import pytest
import torch

from lightning_hyper.analysis.gridnavi import HIT, MISS, optimal_returns, random_returns, told_returns
from lightning_hyper.envs import GridNavi, Trials
from lightning_hyper.experience.collection import first_episodes


def trials(num_envs=1, episodes=4, **options):
    return Trials(partial(GridNavi, num_envs, **options), episodes=episodes, boundary="last")


class Uniform:
    def act(self, step, state):
        return {"action": torch.randint(5, step["task"].shape[:1])}, state


class Told:
    """Goes right to the goal's column, then up to its row, and stays."""

    def act(self, step, state):
        # At the end of an episode the last cell is shown, and the next action acts from the start.
        cell = step["observation"] * (1 - step["episode_done"])
        across, up = (step["task"] - cell).unbind(-1)
        return {"action": torch.where(across > 0, 2, torch.where(up > 0, 1, 0))}, state


def test_random_returns_are_those_of_random_actions():
    env = trials(30_000, episodes=2, size=4, episode_steps=9)
    played = first_episodes(env, Uniform(), deterministic=False)["by_episode"]
    error = played.std(0).numpy() / np.sqrt(len(played))
    np.testing.assert_array_less(np.abs(played.mean(0).numpy() - random_returns(env)), 4 * error)


def test_told_returns_are_those_of_walking_straight_to_the_goal():
    env = trials(20_000, episodes=2)
    ends = first_episodes(env, Told(), deterministic=True)
    by_goal = [ends["by_episode"][(ends["task"] == goal).all(1)] for goal in env.inner.goals]
    assert all(len(returns) > 0 for returns in by_goal)
    np.testing.assert_allclose(torch.stack([each[0] for each in by_goal]).mean(0), told_returns(env), rtol=1e-5)


def best_by_beliefs(size, steps, episodes):
    """The optimum of all policies whatsoever: what is best for each set of goals that what was paid leaves possible."""
    goals = frozenset((x, y) for x in range(size) for y in range(size) if x > 1 or y > 1)

    @cache
    def value(episode, frame, cell, possible):
        if frame == steps:
            return value(episode + 1, 0, (0, 0), possible) if episode + 1 < episodes else 0.0
        best = -np.inf
        for dx, dy in ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)):
            there = (min(max(cell[0] + dx, 0), size - 1), min(max(cell[1] + dy, 0), size - 1))
            total = 0.0
            for paid, left in ((HIT, possible & {there}), (MISS, possible - {there})):
                if left:
                    total += len(left) / len(possible) * (paid + value(episode, frame + 1, there, left))
            best = max(best, total)
        return best

    return value(0, 0, (0, 0), goals)


@pytest.mark.parametrize(("size", "steps", "episodes"), [(3, 6, 1), (3, 5, 2), (3, 4, 3), (4, 7, 2), (4, 6, 3)])
def test_no_policy_is_better_than_the_optimum_and_one_attains_it(size, steps, episodes):
    env = trials(episodes=episodes, size=size, episode_steps=steps)
    assert optimal_returns(env).sum() == pytest.approx(best_by_beliefs(size, steps, episodes))
    assert (optimal_returns(env) <= told_returns(env) + 1e-9).all()


def test_the_papers_trials_pay_four_and_then_as_if_told():
    env = trials()
    np.testing.assert_allclose(optimal_returns(env), [4.0, *[232.5 / 21] * 3])
    np.testing.assert_allclose(told_returns(env), [232.5 / 21] * 4)
    assert optimal_returns(env).sum() == pytest.approx(37.214287, abs=1e-5)
    assert random_returns(env).sum() == pytest.approx(-4.66189, abs=1e-5)


def test_other_rewards_and_grids_too_large_are_refused():
    with pytest.raises(ValueError, match=r"data\.env\.reward is 'dense'"):
        random_returns(trials(reward="dense"))
    with pytest.raises(ValueError, match=r"data\.env\.size is 8"):
        optimal_returns(trials(size=8))
