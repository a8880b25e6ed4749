"""Contexts: what enters the encoder, and when memory begins afresh."""

from functools import partial

import pytest
import torch

from lightning_hyper.modules import OracleContext, RecurrentContext, Spaces
from lightning_hyper.nn import GRU, LSTM, Transformer

SPACES = Spaces(observation=2, task=3, actions=4, discrete=True)


def window(n=3, steps=10, init=((0, 0), (1, 0), (2, 0))):
    is_init = torch.zeros(n, steps, 1, dtype=torch.bool)
    for row, t in init:
        is_init[row, t] = True
    return {
        "observation": torch.randn(n, steps, 2),
        "episode_done": (torch.rand(n, steps, 1) < 0.2).float(),
        "previous_action": torch.randint(4, (n, steps)),
        "previous_reward": torch.randn(n, steps, 1),
        "is_init": is_init,
        "task": torch.randn(n, steps, 3),
    }


def part(data, start, end):
    return {key: entry[:, start:end] for key, entry in data.items()}


@pytest.mark.parametrize("first_step", ["observation", "zero"])
@pytest.mark.parametrize("encoder", [GRU, LSTM, partial(Transformer, width=8, heads=2, memory=6)])
def test_a_window_equals_stepping_it_with_resets_inside(encoder, first_step):
    source = RecurrentContext(SPACES, encoder=encoder, action_embedding=4, first_step=first_step)
    data = window(init=((0, 0), (1, 0), (2, 0), (1, 4), (2, 5), (2, 6)))
    whole, after = source(data, None)
    state, steps = None, []
    for t in range(10):
        c, state = source(part(data, t, t + 1), state)
        steps.append(c)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, after, atol=1e-5, rtol=1e-4)


def test_memory_crosses_episodes_but_never_trials():
    source = RecurrentContext(SPACES)
    data = window(init=((0, 0), (1, 0), (2, 0), (0, 5)))
    data["episode_done"][:] = 0
    data["episode_done"][:, 5] = 1
    changed = {key: entry.clone() for key, entry in data.items()}
    changed["previous_reward"][:, 2] += 5
    before, after = source(data, None)[0], source(changed, None)[0]
    assert torch.equal(before[0, 5:], after[0, 5:])
    assert not torch.allclose(before[1, 5:], after[1, 5:])


def test_first_context_under_zero_ignores_the_first_observation_and_leaves_no_trace():
    source = RecurrentContext(SPACES, first_step="zero")
    data = window()
    changed = {key: entry.clone() for key, entry in data.items()}
    changed["observation"][:, 0] += 5
    assert torch.equal(source(data, None)[0], source(changed, None)[0])
    rest = part(data, 1, 10)
    torch.testing.assert_close(source(data, None)[0][:, 1:], source(rest, None)[0])


def test_action_is_not_taken_for_action_zero_at_the_first_step():
    source = RecurrentContext(SPACES, action_embedding=4, observation_embedding=0, reward_embedding=0)
    data = window()
    changed = {**data, "previous_action": data["previous_action"].clone()}
    changed["previous_action"][:, 0] = (data["previous_action"][:, 0] + 1) % 4
    assert torch.equal(source(data, None)[0], source(changed, None)[0])
    changed["previous_action"][:, 1] = (data["previous_action"][:, 1] + 1) % 4
    assert not torch.allclose(source(data, None)[0][:, 1], source(changed, None)[0][:, 1])


def test_code_and_embedding_set_the_features():
    assert RecurrentContext(SPACES, code=5).out_features == 10
    assert RecurrentContext(SPACES, code=5, embed=25).out_features == 25
    assert RecurrentContext(SPACES, code=None, encoder=partial(GRU, hidden=7)).out_features == 7


def test_oracle_context_is_the_standardised_task():
    source = OracleContext(SPACES)
    data = window(n=50, init=())
    data["task"] = data["task"] * 3 + 7
    source.observe(data)
    flat = data["task"].flatten(0, 1)
    expected = (data["task"] - flat.mean(0)) / flat.std(0, unbiased=False)
    torch.testing.assert_close(source(data, None)[0], expected)


def test_an_encoder_that_would_see_nothing_is_refused():
    with pytest.raises(ValueError, match="every embedding is 0"):
        RecurrentContext(SPACES, observation_embedding=0, reward_embedding=0)
