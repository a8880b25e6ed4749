"""What tests of several environments share."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from lightning_hyper.envs import Gym


@pytest.fixture
def play():
    """`play(env, actions)`: what follows each action, `[time, num_envs, ...]`; episodes that are over begin anew."""

    def played(env, actions):
        found = []
        for action in actions:
            step = env.advance(action)
            found.append(step)
            if step["done"].any():
                env.begin(step["done"].squeeze(-1))
        return {key: torch.stack([step[key] for step in found]) for key in found[0]}

    return played


@pytest.fixture
def continues(play):
    """`continues(env, other, actions, frames)`: a fresh environment goes on exactly where one has been saved."""

    def checked(env, other, actions, frames):
        play(env, actions[:frames])
        state = env.save_state()
        shown = dict(env.current)
        expected = play(env, actions[frames:])
        other.load_state(state)
        for key, entry in shown.items():
            assert torch.equal(other.current[key], entry), key
        found = play(other, actions[frames:])
        assert expected["done"].any()
        for key, entry in expected.items():
            assert torch.equal(found[key], entry), key
        assert_same(env.save_state(), other.save_state())

    return checked


def assert_same(one, other):
    """Nested states are equal, bit for bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


class Anything(gymnasium.Env):
    """Samples from its spaces, ends by itself at times, and wants its actions as its space has them."""

    metadata = {"render_modes": []}  # noqa: RUF012  as gymnasium has it

    def __init__(self, observation=None, action=None, render_mode=None):
        self.observation_space = observation or Box(-1, 1)
        self.action_space = action or Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {"seed": seed}

    def step(self, action):
        assert self.action_space.contains(action), action
        end = self.np_random.random() < 0.2
        return self.observation_space.sample(), float(np.sum(action)), bool(end), False, {}


@pytest.fixture
def anything_class():
    return Anything


@pytest.fixture
def anything():
    """`anything(observation, action, **options)`: a Gym of them."""
    gymnasium.register("Anything-v0", Anything)

    def made(observation=None, action=None, *, num_envs=3, **options):
        return Gym("Anything-v0", num_envs, arguments={"observation": observation, "action": action}, **options)

    yield made
    del gymnasium.registry["Anything-v0"]
