"""The planner's plans are played in the package, and are as short as plans can be."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from minigrid.core.world_object import WorldObj

from lightning_hyper.analysis.minigrid import planner_returns, random_returns, shortest_plan
from lightning_hyper.envs import MiniGrid
from lightning_hyper.envs.minigrid import SETS
from lightning_hyper.envs.minigrid_package import ACTIONS, begin, describe, level_seed


@pytest.mark.parametrize("task", SETS["twenty"])
def test_a_plan_played_in_the_package_is_paid_what_the_planner_says(task):
    described = describe(task)
    env = described.make()
    for level, promised in enumerate(planner_returns(task, levels=2, seed=3)):
        begin(env, level_seed(3, level))
        steps = [env.step(action) for action in shortest_plan(described, level, seed=3)]
        assert not any(terminated for _, _, terminated, _, _ in steps[:-1])
        _, reward, terminated, _, _ = steps[-1]
        assert terminated
        assert reward == pytest.approx(promised)


def test_no_plan_is_shorter_than_the_shortest():
    described = describe("MiniGrid-DoorKey-5x5-v0")
    env = described.make()
    begin(env, level_seed(0, 0))
    promised = len(shortest_plan(described, 0))
    assert _fewest_steps(env) == promised
    assert len(shortest_plan(replace(described, max_steps=promised), 0)) == promised
    assert shortest_plan(replace(described, max_steps=promised - 1), 0) is None


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match=r"PutNear.* has rules of its own"):
        planner_returns("MiniGrid-PutNear-6x6-N2-v0", levels=1)


def _fewest_steps(env):
    """Breadth first over the package's own steps, each state written down and put back."""

    def save():
        held = env.carrying
        return env.grid.encode().tobytes(), tuple(env.agent_pos), env.agent_dir, held and held.encode()

    def put_back(state):
        cells, place, direction, held = state
        shape = (env.width, env.height, 3)
        env.grid, _ = env.grid.decode(np.frombuffer(cells, dtype=np.uint8).reshape(shape))
        env.agent_pos, env.agent_dir, env.step_count = place, direction, 0
        env.carrying = held and WorldObj.decode(*held)

    layer, seen, depth = [save()], {save()}, 0
    while layer:
        depth += 1
        following = []
        for state in layer:
            for action in range(ACTIONS):
                put_back(state)
                reward, terminated = env.step(action)[1:3]
                if reward > 0:
                    return depth
                after = save()
                if not terminated and after not in seen:
                    seen.add(after)
                    following.append(after)
        layer = following
    return None


def test_random_returns_are_told_apart_by_task():
    torch.manual_seed(0)
    env = MiniGrid(120, tasks=["MiniGrid-UnlockPickup-v0", "MiniGrid-Empty-5x5-v0"])
    env.set_seed(0)
    hard, easy = random_returns(env)
    assert hard < 0.05
    assert 0.2 < easy < planner_returns("MiniGrid-Empty-5x5-v0", levels=1)[0] == pytest.approx(0.955)
