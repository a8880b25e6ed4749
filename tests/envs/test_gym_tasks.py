"""Tasks that a recipe lists are drawn, played and shown."""

import pytest
import torch
from gymnasium.spaces import Discrete
from torchrl.envs.utils import check_env_specs

from lightning_hyper.envs import Gym


def test_listed_tasks_are_drawn_and_played():
    gravities = [1.0, 10.0, 30.0]
    env = Gym("Pendulum-v1", 60, tasks=[{"g": gravity} for gravity in gravities])
    assert env.tasks == ("g 1.0", "g 10.0", "g 30.0")
    assert env.has_tasks
    check_env_specs(env)
    env.set_seed(0)
    task = env.begin()["task"]
    assert (task.bincount(minlength=3) > 8).all()
    for row, one in enumerate(env.vec.envs):
        assert one.unwrapped.g == gravities[task[row]]
    # An equal row of another task falls otherwise.
    step = env.current["observation"]
    after = env.advance(torch.zeros(60, 1))["observation"]
    expected = step[:, 2] + 0.05 * 1.5 * torch.tensor(gravities)[task] * step[:, 1]
    torch.testing.assert_close(after[:, 2], expected.clamp(-8, 8), rtol=1e-5, atol=1e-5)
    rows = torch.arange(60) < 30
    again = env.begin(rows)["task"]
    assert torch.equal(again[30:], task[30:])
    assert not torch.equal(again[:30], task[:30])
    assert torch.equal(env.begin(same_task=True)["task"], again)


def test_listed_tasks_continue_bit_for_bit(continues):
    env, other = (Gym("Pendulum-v1", 5, arguments={"max_episode_steps": 20}, tasks=[{}, {"g": 3.0}]) for _ in range(2))
    env.set_seed(0)
    env.begin()
    continues(env, other, [env.action_spec.rand() for _ in range(90)], 33)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "data.env.tasks is .*; it must list at least one task's arguments"),
        ({"tasks": [{"g": 1.0}, {"g": 1.0}]}, "data.env.tasks is .*none of them twice"),
        ({"tasks": [{"h": 1.0}]}, r"Gym\('Pendulum-v1'\) cannot be made with data.env.arguments {'h': 1.0}"),
        ({"tasks": [{}], "asynchronous": True}, "data.env.asynchronous is true, but .* has tasks"),
    ],
)
def test_bad_tasks_name_the_key(options, message):
    with pytest.raises(ValueError, match=message):
        Gym("Pendulum-v1", **options)


def test_tasks_of_other_spaces_are_refused(anything):
    with pytest.raises(
        ValueError, match=r"data.env.tasks: the task 'action .*' has observation space .*; all must have"
    ):
        anything(tasks=[{}, {"action": Discrete(3)}])
