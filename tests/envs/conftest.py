"""What tests of several environments share."""

import pytest
import torch


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
