"""Sizes are read from the specs of an environment, and say which networks serve which."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torchrl.data import MultiCategorical, Unbounded

from lightning_hyper.checks import RecipeError
from lightning_hyper.envs import GridNavi, Gym, MiniGrid, Pendulum, Trials
from lightning_hyper.envs.spaces import Spaces


def test_vectors_and_discrete_actions():
    spaces = Spaces.of(Gym("CartPole-v1", num_envs=3))
    assert (spaces.observation, spaces.features, spaces.is_image) == ((4,), 4, False)
    assert (spaces.actions, spaces.discrete, spaces.low, spaces.high) == (2, True, (), ())
    assert (spaces.horizon, spaces.trials, spaces.task, spaces.tasks) == (500, False, 0, ())


def test_bounded_actions():
    spaces = Spaces.of(Pendulum(3, episode_steps=9))
    assert (spaces.actions, spaces.discrete, spaces.low, spaces.high) == (1, False, (-2.0,), (2.0,))
    assert spaces.horizon == 9


def test_trials_last_for_all_their_episodes_and_show_their_ends():
    inner = partial(GridNavi, 3, episode_steps=5)
    assert not Spaces.of(inner()).trials
    spaces = Spaces.of(Trials(inner, episodes=4))
    assert (spaces.trials, spaces.horizon, spaces.task, spaces.tasks) == (True, 20, 2, ())


def test_tasks_that_are_an_index_have_names():
    spaces = Spaces.of(Gym("CartPole-v1", 2, tasks=[{"max_episode_steps": 5}, {"max_episode_steps": 9}]))
    assert len(spaces.tasks) == 2
    assert spaces.task == 0


def test_missions_are_those_of_each_task_in_order():
    ids = ["MiniGrid-Empty-5x5-v0", "MiniGrid-GoToDoor-6x6-v0"]
    spaces = Spaces.of(MiniGrid(2, tasks=ids, levels=2))
    assert spaces.observation == (7, 7, 3)
    assert spaces.is_image
    assert spaces.tasks == tuple(ids)
    assert spaces.missions[0] == ("get to the green goal square",)
    assert "go to the red door" in spaces.missions[1]


def test_an_index_becomes_a_one_hot_and_a_real_action_stays():
    action = torch.tensor([[0, 2], [1, 2]])
    discrete = Spaces((2,), 3, True)
    assert torch.equal(discrete.action_features(action), F.one_hot(action, 3).float())
    assert discrete.action_features(action).dtype == torch.float32
    real = torch.randn(2, 2, 3)
    assert torch.equal(Spaces((2,), 3, False).action_features(real), real)


def test_networks_fit_where_all_but_the_horizon_and_the_raw_spaces_is_equal():
    spaces = Spaces((4,), 2, True)
    assert spaces.fits(replace(spaces, horizon=7, raw={"observation": 1}))
    others = {"observation": (3,), "actions": 3, "discrete": False, "trials": True, "task": 2, "tasks": ("a",)}
    others |= {"missions": (("go",),), "low": (-1.0,), "high": (1.0,)}
    for key, value in others.items():
        assert not spaces.fits(replace(spaces, **{key: value})), key


def test_plain_data_make_them_again():
    spaces = Spaces.of(Gym("CartPole-v1"))
    assert Spaces(**spaces.asdict()) == spaces


@pytest.mark.parametrize(
    "spec",
    [
        Unbounded((2, 2), dtype=torch.int64),
        MultiCategorical([2, 3], shape=(2, 2)),
    ],
)
def test_an_action_of_another_kind_is_refused(spec):
    env = Pendulum(2)
    env.action_spec = spec
    with pytest.raises(RecipeError, match=r"data.env: Pendulum has action spec"):
        Spaces.of(env)
