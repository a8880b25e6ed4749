"""Any Gymnasium id: what it shows is what gymnasium's own loop shows."""

import sys
import types

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple
from torchrl.envs.utils import check_env_specs

from lightning_hyper.envs import Gym
from lightning_hyper.envs.gym_spaces import rebuild, to_action, to_observation


def seeds_of(env):
    """Seeds that each reset gives to the copies, recorded from here on; None where a copy goes on."""
    recorded, reset = [], env.vec.reset

    def noted(*, seed, options=None):
        mask = np.ones(len(seed), dtype=bool) if options is None else options["reset_mask"]
        recorded.append([one if chosen else None for one, chosen in zip(seed, mask, strict=True)])
        return reset(seed=seed, options=options)

    env.vec.reset = noted
    return recorded


@pytest.mark.parametrize("id", ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1", "Blackjack-v1"])
def test_every_step_is_that_of_gymnasiums_own_loop(id):  # noqa: A002
    env = Gym(id, 3)
    check_env_specs(env)
    env.set_seed(1)
    seeds = seeds_of(env)
    others = [gymnasium.make(id) for _ in range(3)]
    space = others[0].observation_space

    def begin(row):
        return to_observation(space, others[row].reset(seed=seeds[-1][row])[0])

    step = env.begin()
    for row in range(3):
        assert np.array_equal(step["observation"][row], begin(row))
    torch.manual_seed(0)
    ends = 0
    for _ in range(260):
        action = env.action_spec.rand()
        step = env.advance(action)
        for row, other in enumerate(others):
            chosen = action[row].item() if action.dtype == torch.int64 else action[row].numpy()
            observation, reward, terminated, truncated, _ = other.step(chosen)
            expected = gymnasium.spaces.flatten(space, observation)
            np.testing.assert_allclose(step["observation"][row], expected, rtol=1e-6)
            assert step["reward"][row].item() == pytest.approx(reward, rel=1e-6)
            assert step["terminated"][row].item() == terminated
            assert step["truncated"][row].item() == (truncated and not terminated)
        over = step["done"].flatten()
        if over.any():
            following = env.begin(over)
            for row in over.nonzero().flatten().tolist():
                ends += 1
                assert np.array_equal(following["observation"][row], begin(row))
    assert ends >= 3


def test_a_time_limit_truncates_and_a_fall_terminates():
    env = Gym("CartPole-v1", 2, arguments={"max_episode_steps": 5})
    assert env.horizon == 5
    batch = env.rollout(10, break_when_any_done=False)["next"]
    assert batch["truncated"][0, :, 0].tolist() == ([False] * 4 + [True]) * 2
    assert not batch["terminated"].any()
    env = Gym("CartPole-v1", 1)
    env.begin()
    for _ in range(20):
        step = env.advance(torch.tensor([0]))
        if step["done"]:
            break
    assert (step["terminated"].item(), step["truncated"].item()) == (True, False)
    # The last observation is that of the fall, not of the next start.
    assert step["observation"][0, 2].abs() > 0.2


def test_an_environment_may_cut_itself_off(anything_class):
    class Cut(anything_class):
        def reset(self, *, seed=None, options=None):
            self.left = 3
            return super().reset(seed=seed)

        def step(self, action):
            self.left -= 1
            return self.observation_space.sample(), 0.0, self.left == 0 and bool(action), self.left == 0, {}

    gymnasium.register("Cut-v0", Cut)
    try:
        env = Gym("Cut-v0", 2)
        env.begin()
        ends = [env.advance(torch.tensor([0, 1])) for _ in range(3)]
        assert [step["done"].flatten().tolist() for step in ends] == [[False] * 2, [False] * 2, [True] * 2]
        # Where both are said, the task has ended.
        assert ends[-1]["truncated"].flatten().tolist() == [True, False]
        assert ends[-1]["terminated"].flatten().tolist() == [False, True]
    finally:
        del gymnasium.registry["Cut-v0"]


def test_horizon_and_seconds_are_gymnasiums_where_it_says_them():
    env = Gym("CartPole-v1")
    assert (env.horizon, env.seconds) == (500, 0.02)
    assert (Gym("Blackjack-v1").horizon, env.has_tasks, env.tasks) == (1_000_000, False, ())


def test_an_episode_that_went_on_beyond_its_end_begins_by_itself():
    env = Gym("CartPole-v1", 2)
    env.set_seed(0)
    env.begin()
    for _ in range(40):
        step = env.advance(torch.zeros(2, dtype=torch.int64))
        assert step["observation"][:, 2].abs().max() < 0.5
    assert step["step_count"].tolist() == [[40]] * 2


@pytest.mark.parametrize(
    "observation",
    [
        Dict({"b": Discrete(3), "a": Tuple((Box(-1, 1, (2, 2), np.float64), MultiBinary(2)))}),
        Tuple((MultiDiscrete([2, 3]), Discrete(2, start=4))),
        Box(np.array([-1.0, 0.0]), np.array([5.0, 0.5]), dtype=np.float64),
        Box(0, 255, (4, 4, 3), np.uint8),
    ],
    ids=["dict", "tuple", "asymmetric", "image"],
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_any_observation_is_shown_as_its_space_says(anything, observation, asynchronous):
    env = anything(observation, asynchronous=asynchronous)
    check_env_specs(env)
    env.set_seed(3)
    seeds = seeds_of(env)
    step = env.begin()
    for row in range(3):
        observation.seed(seeds[0][row])
        assert np.array_equal(step["observation"][row], to_observation(observation, observation.sample()))
    for _ in range(10):
        step = env.advance(env.action_spec.rand())
        env.begin(step["done"].flatten())
    env.close()


@pytest.mark.parametrize(
    "action",
    [Discrete(3, start=2), Box(-2, 1, (2, 2)), Box(np.array([-1.0, 0.0]), np.array([5.0, 0.5]), dtype=np.float64)],
    ids=["start", "matrix", "asymmetric"],
)
def test_actions_reach_the_environment_as_its_space_has_them(anything, action):
    env = anything(action=action)
    check_env_specs(env)
    env.begin()
    for _ in range(10):
        chosen = env.action_spec.rand()
        # The environment itself refuses what its space does not contain.
        step = env.advance(chosen if chosen.dtype == torch.int64 else chosen * 3)
        for row in range(3):
            taken = chosen[row] + 2 if chosen.dtype == torch.int64 else chosen[row] * 3
            if taken.dtype != torch.int64:
                taken = taken.clamp(*(torch.from_numpy(edge.reshape(-1)) for edge in (action.low, action.high)))
            assert step["reward"][row].item() == pytest.approx(taken.sum().item(), rel=1e-5)


def test_asynchronous_copies_give_the_same_episodes():
    found = []
    for asynchronous in (False, True):
        env = Gym("CartPole-v1", 3, asynchronous=asynchronous)
        env.set_seed(1)
        torch.manual_seed(0)
        steps = [env.begin()]
        for _ in range(60):
            steps.append(env.advance(torch.randint(2, (3,))))
            if steps[-1]["done"].any():
                steps.append(env.begin(steps[-1]["done"].flatten()))
        found.append(steps)
        env.close()
    assert len(found[0]) > 63
    for one, other in zip(*found, strict=True):
        for key, entry in one.items():
            assert torch.equal(entry, other[key]), key
    assert "processes of its own" in env.why_not_exact


def test_raw_spaces_take_what_the_environment_itself_shows():
    env = Gym("Blackjack-v1")
    other = gymnasium.make("Blackjack-v1")
    spaces = {key: rebuild(plain) for key, plain in env.raw.items()}
    assert spaces == {"observation": other.observation_space, "action": other.action_space}
    observation, _ = other.reset(seed=0)
    assert to_observation(spaces["observation"], observation).sum() == 3
    other.step(to_action(spaces["action"], 1))


def test_wrappers_are_put_around_from_the_inside_out():
    stacked = {"class_path": "gymnasium.wrappers.FrameStackObservation", "init_args": {"stack_size": 3}}
    env = Gym("CartPole-v1", 2, wrappers=[stacked])
    assert env.begin()["observation"].shape == (2, 3, 4)
    check_env_specs(env)
    env = Gym("CartPole-v1", 2, wrappers=[stacked, "gymnasium.wrappers.FlattenObservation"])
    assert env.begin()["observation"].shape == (2, 12)
    assert env.horizon == 500


def test_an_id_names_the_module_that_registers_it(monkeypatch, anything_class):
    module = types.ModuleType("of_a_user")
    monkeypatch.setitem(sys.modules, "of_a_user", module)
    gymnasium.register("OfAUser-v0", anything_class)
    try:
        assert Gym("of_a_user:OfAUser-v0").begin()["observation"].shape == (1, 1)
    finally:
        del gymnasium.registry["OfAUser-v0"]


def test_pictures_are_made_when_asked_for():
    env = Gym("CartPole-v1", 2, render=True)
    env.begin()
    assert (env.render().shape, env.render().dtype) == ((400, 600, 3), np.uint8)
    env = Gym("CartPole-v1")
    env.begin()
    assert env.render() is None


@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (
            None,
            MultiDiscrete([3, 2]),
            r"has action space MultiDiscrete\(\[3 2\]\); supported are Discrete, and Box with bounds",
        ),
        (
            None,
            Box(-np.inf, np.inf, (2,)),
            r"has action space Box\(-inf, inf, .*; supported are Discrete, and Box with bounds",
        ),
        (None, Box(np.zeros(2), np.array([1.0, 0.0]), dtype=np.float64), "has action space Box.*; supported are"),
        (None, MultiBinary(2), r"has action space MultiBinary\(2\)"),
        (
            Text(4),
            None,
            r"has observation space Text\(1, 4, .*; supported are Box, Discrete, MultiBinary and MultiDiscrete",
        ),
        (Dict(a=Discrete(2), b=Text(4)), None, "has observation space Dict.*data.env.wrappers may leave parts out"),
    ],
)
def test_other_spaces_are_refused_in_a_sentence(anything, observation, action, message):
    with pytest.raises(ValueError, match=rf"^data.env: Gym\('Anything-v0'\) {message}"):
        anything(observation, action)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"id": "CartPol-v1"}, "data.env.id is 'CartPol-v1', which gymnasium does not know .*close to it: CartPole-v1"),
        ({"id": "CartPole-v9"}, "data.env.id is 'CartPole-v9', which gymnasium does not know .*CartPole-v1"),
        ({"id": "Xyzzyq-v0"}, "does not know .*put `module:` before it"),
        ({"id": "no_such_module:A-v0"}, "data.env.id is .* the module no_such_module cannot be imported"),
        ({"arguments": {"x": 1}}, r"Gym\('CartPole-v1'\) cannot be made with data.env.arguments {'x': 1}"),
        ({"num_envs": 0}, "Gym.num_envs is 0; it must be a whole number from 1"),
        ({"wrappers": ["gymnasium.wrappers.Nope"]}, "data.env.wrappers: gymnasium.wrappers.Nope cannot be imported"),
        ({"wrappers": ["nope"]}, "data.env.wrappers has 'nope'; it must be a class path"),
        ({"wrappers": [{"class_path": "a.B", "args": 1}]}, "data.env.wrappers has .*; it must be a class path"),
        ({"wrappers": ["gymnasium.wrappers.FrameStackObservation"]}, "cannot be put around it .*stack_size"),
        ({"wrappers": ["builtins.str"]}, "data.env.wrappers: builtins.str gives a str"),
    ],
)
def test_bad_options_name_the_key(options, message):
    with pytest.raises(ValueError, match=message):
        Gym(**{"id": "CartPole-v1", **options})


@pytest.mark.filterwarnings("ignore:.*possible render_modes.*")
def test_pictures_of_what_has_none_are_refused(anything):
    with pytest.raises(ValueError, match=r"data.env.render is true, but Gym\('Anything-v0'\) makes no pictures"):
        anything(render=True)


def test_atari_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(ValueError, match=r"needs the Atari games: pip install 'lightning-hyper\[atari\]'"):
        Gym("ALE/Pong-v5")


def test_a_users_own_error_keeps_its_traceback(anything, anything_class):
    class Broken(anything_class):
        def step(self, action):
            raise KeyError("mine")

    gymnasium.register("Broken-v0", Broken)
    try:
        env = Gym("Broken-v0")
        env.begin()
        with pytest.raises(KeyError, match="mine"):
            env.advance(torch.zeros(1, dtype=torch.int64))
    finally:
        del gymnasium.registry["Broken-v0"]


@pytest.mark.gpu
def test_entries_live_on_the_device():
    env = Gym("CartPole-v1", 3, device="cuda")
    env.begin()
    step = env.advance(env.action_spec.rand())
    assert {entry.device.type for entry in step.values()} == {"cuda"}
