"""A Gymnasium environment whose state is plain data goes on exactly where it was saved; any other says so."""

from collections import deque

import gymnasium
import numpy as np
import pytest
import torch

from lightning_hyper.envs import Gym
from lightning_hyper.envs.gym_state import pack, restore, snapshot, unpack


@pytest.mark.parametrize("id", ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1", "Blackjack-v1"])
def test_a_fresh_object_continues_bit_for_bit(continues, id):  # noqa: A002
    env, other = Gym(id, 3), Gym(id, 3)
    assert env.exact
    assert env.why_not_exact == ""
    env.set_seed(0)
    env.begin()
    continues(env, other, [env.action_spec.rand() for _ in range(300)], 47)


def test_simulators_are_not_continued_and_say_so():
    env = Gym("InvertedPendulum-v5", 2)
    assert env.why_not_exact == (
        "Gym('InvertedPendulum-v5') has state that is not plain data, so that a resumed run begins new episodes"
    )
    env.set_seed(0)
    env.begin()
    env.advance(torch.zeros(2, 1))
    state = env.save_state()
    assert state.keys() == {"generator", "current"}
    starts = []
    for _ in range(2):
        env.load_state(state)
        starts.append(env.current["observation"])
    assert env.current["is_init"].all()
    assert torch.equal(*starts)


def test_an_end_that_was_saved_is_one_and_what_was_none_is_none():
    env, other = Gym("CartPole-v1", 2), Gym("CartPole-v1", 2)
    push = torch.tensor([0, 1])
    env.set_seed(0)
    env.begin()
    over = False
    while not over:
        before = env.save_state()
        over = env.advance(push)["done"].any()
    ended = env.save_state()
    # Each is loaded where the other has just been.
    for state in (ended, before, ended):
        found = []
        for one in (env, other):
            one.load_state(state)
            found.append([one.advance(push) for _ in range(30)])
        for mine, theirs in zip(*found, strict=True):
            for key, entry in mine.items():
                assert torch.equal(entry, theirs[key]), key


def test_trying_whether_it_continues_leaves_the_global_generators_alone(anything_class):
    class Careless(anything_class):
        def step(self, action):
            np.random.rand()
            torch.rand(1)
            return super().step(action)

    gymnasium.register("Careless-v0", Careless)
    try:
        torch.manual_seed(0)
        np.random.seed(0)
        expected = torch.rand(1), np.random.rand()
        torch.manual_seed(0)
        np.random.seed(0)
        assert Gym("Careless-v0").why_not_exact
        assert (torch.rand(1), np.random.rand()) == expected
    finally:
        del gymnasium.registry["Careless-v0"]


def test_plain_data_is_packed_as_torch_reads_it(tmp_path):
    value = {
        "numbers": [1, 2.5, True, None, "x", 2**100],
        (1, "key"): (np.float64(2.5), np.int32(3), np.bool_(True)),
        "arrays": [np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::-1], np.zeros(0), np.array(3.0)],
        "queue": deque([np.ones(2)], maxlen=4),
        "set": {1, 2},
        "generator": np.random.default_rng(4),
    }
    torch.save(pack(value), tmp_path / "packed.pt")
    again = unpack(torch.load(tmp_path / "packed.pt", weights_only=True))
    assert again["generator"].random() == value["generator"].random()
    assert again["queue"].maxlen == 4
    for one, other in zip(again[(1, "key")], value[(1, "key")], strict=True):
        assert (one, type(one)) == (other, type(other))
    for one, other in zip(again["arrays"], value["arrays"], strict=True):
        assert np.array_equal(one, other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert again["numbers"] == value["numbers"]
    assert again["set"] == value["set"]
    with pytest.raises(TypeError, match="object"):
        pack([object()])


def test_parts_that_share_a_generator_still_share_it():
    env = gymnasium.make("CartPole-v1")
    env.reset(seed=0)
    shared = env.unwrapped.shared = env.unwrapped.np_random
    state = snapshot(env)
    expected = [shared.random(), env.unwrapped.np_random.random()]
    restore(env, state)
    assert [env.unwrapped.shared.random(), env.unwrapped.np_random.random()] == expected
