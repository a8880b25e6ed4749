"""Trials are what a plain loop over episodes of one task makes of them."""

from collections.abc import Callable

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from jsonargparse import ArgumentParser

from lightning_hyper.envs import BatchedEnv, GridNavi, Gym, MiniGrid, Pendulum, Trials


class Bandit(gymnasium.Env):
    """The task is the arm that pays; pulling arm 2 ends the episode."""

    observation_space = Box(-np.inf, np.inf, (2,))
    action_space = Discrete(3)
    arm = 0

    def sample_tasks(self, num):
        return [{"arm": int(arm), "worth": np.array([1.5, arm])} for arm in self.np_random.integers(100, size=num)]

    def set_task(self, task):
        self.arm, self.episodes = task["arm"], 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.step_number, self.episodes = 0, self.episodes + 1
        return self.shown(), {}

    def shown(self):
        return np.array([self.step_number, self.episodes], dtype=np.float32)

    def step(self, action):
        self.step_number += 1
        return self.shown(), float(self.arm), bool(action == 2), False, {}


class Wordy(Bandit):
    """Its tasks are no numbers, and are drawn from the global generator."""

    def sample_tasks(self, num):
        return [{"name": f"task {arm}"} for arm in np.random.randint(100, size=num)]

    def set_task(self, task):
        self.arm, self.episodes = int(task["name"].split()[1]), 0


@pytest.fixture(autouse=True)
def _registered():
    gymnasium.register("Bandit-v0", Bandit, max_episode_steps=5)
    gymnasium.register("Wordy-v0", Wordy, max_episode_steps=5)
    yield
    del gymnasium.registry["Bandit-v0"], gymnasium.registry["Wordy-v0"]


def looped(env, actions, episodes, boundary):
    """What trials show, from an environment that is begun and stepped by hand, one at a time."""
    step = env.begin()
    shown, episode, count, total = [], 0, 0, 0.0
    for action in actions:
        step = env.advance(action)
        over = step["done"].item()
        count, total, episode = count + 1, total + step["reward"].item(), episode + over
        done = over and episode == episodes
        entry = {
            "reward": step["reward"].item(),
            "done": done,
            "terminated": done,
            "truncated": False,
            "observation": step["observation"][0],
            "task": step["task"][0],
            "step_count": count,
            "episode_return": total,
            "episode": episode,
            "episode_done": float(over),
            "is_init": False,
            "previous_reward": step["reward"].item(),
        }
        shown.append(entry)
        if done:
            step, episode, count, total = env.begin(), 0, 0, 0.0
        elif over:
            following = env.begin(same_task=True)
            if boundary == "first":
                entry["observation"] = following["observation"][0]
    return shown


MAKE = {
    "GridNavi": lambda **o: GridNavi(**o, episode_steps=3),
    "CartPole": lambda **o: Gym("CartPole-v1", **o, tasks=[{}, {"sutton_barto_reward": True}]),
    "Bandit": lambda **o: Gym("Bandit-v0", **o),
}


@pytest.mark.parametrize("boundary", ["first", "last"])
@pytest.mark.parametrize("name", MAKE)
def test_every_step_is_that_of_a_plain_loop(name, boundary, play):
    trials, inner = Trials(MAKE[name], 3, boundary, num_envs=1), MAKE[name](num_envs=1)
    for env in (trials, inner):
        env.set_seed(2)
    torch.manual_seed(0)
    actions = [trials.action_spec.rand() for _ in range(200)]
    expected = looped(inner, actions, 3, boundary)
    begun = trials.begin()
    assert begun["episode"].item() == begun["episode_done"].item() == begun["step_count"].item() == 0
    found = play(trials, actions)
    for t, entry in enumerate(expected):
        for key, value in entry.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(found[key][t, 0], value), (t, key)
            else:
                assert found[key][t].item() == pytest.approx(value), (t, key)
    assert found["done"].sum() >= 3
    assert found["task"].unique(dim=0).shape[0] > 1


def test_the_boundary_first_shows_the_next_start_and_last_the_end():
    for boundary, shown in (("first", [0.0, 2.0]), ("last", [1.0, 1.0])):
        env = Trials(MAKE["Bandit"], 2, boundary, num_envs=1)
        env.begin()
        step = env.advance(torch.tensor([2]))
        assert step["observation"][0].tolist() == shown
        assert (step["episode_done"].item(), step["done"].item()) == (1, False)
        # The next action acts from the start in either case.
        assert env.advance(torch.tensor([0]))["observation"][0].tolist() == [1, 2]
        # The end of a trial shows its last observation.
        step = env.advance(torch.tensor([2]))
        assert step["observation"][0].tolist() == [2, 2]
        assert step["done"].item()


@pytest.mark.parametrize("boundary", ["first", "last"])
def test_a_trial_begun_in_the_middle_leaves_the_others_alone(boundary):
    env, alone = (Trials(MAKE["GridNavi"], 4, boundary, num_envs=3) for _ in range(2))
    actions = torch.randint(5, (10, 3))
    for one in (env, alone):
        one.set_seed(0)
        one.begin()
        for action in actions[:6]:
            shown = one.advance(action)
    rows = torch.tensor([False, True, False])
    after = env.begin(rows)
    for key, entry in after.items():
        assert torch.equal(entry[~rows], shown[key][~rows]), key
    assert after["episode"].flatten().tolist() == [2, 0, 2]
    assert after["episode_done"].flatten().tolist() == [1, 0, 1]
    assert after["is_init"].flatten().tolist() == [False, True, False]
    for action in actions[6:]:
        found, expected = env.advance(action), alone.advance(action)
        for key, entry in expected.items():
            assert torch.equal(found[key][~rows], entry[~rows]), key


def test_done_comes_only_at_the_end_of_a_trial_and_is_a_termination():
    env = Trials(lambda **o: GridNavi(**o, episode_steps=4), 2, num_envs=3)
    assert env.horizon == 8
    batch = env.rollout(8, break_when_any_done=False)
    done = batch["next", "done"].squeeze(-1)
    assert done.sum().item() == 3
    assert done[:, 7].all()
    assert torch.equal(batch["next", "terminated"], batch["next", "done"])
    assert not batch["next", "truncated"].any()
    assert batch["is_init"].squeeze(-1).sum(1).tolist() == [1, 1, 1]


def test_all_episodes_of_a_trial_have_its_task_and_each_trial_draws_one():
    env = Trials(MAKE["Bandit"], 2, num_envs=50)
    env.set_seed(0)
    first = env.begin()["task"]
    assert first.shape == (50, 3)
    assert len(first.unique(dim=0)) > 20
    for _ in range(2):
        step = env.advance(torch.full((50,), 2))
        assert torch.equal(step["task"], first)
        assert torch.equal(step["reward"], first[:, :1])
    assert step["done"].all()
    assert (env.begin()["task"] != first).any(1).sum() > 40


def test_tasks_that_are_no_numbers_are_not_shown_but_played(continues):
    env, other = (Trials(lambda **o: Gym("Wordy-v0", **o), 2, num_envs=20) for _ in range(2))
    assert "task" not in env.begin()
    rewards = [env.advance(torch.full((20,), 2))["reward"] for _ in range(2)]
    assert torch.equal(*rewards)
    assert len(rewards[0].unique()) > 5
    assert env.exact
    env.begin()
    continues(env, other, torch.randint(3, (40, 20)), 7)


def test_what_the_inner_environment_shows_is_shown():
    env = Trials(lambda **o: MiniGrid(**o, tasks="three"), 2, num_envs=6)
    step = env.begin()
    assert step["task"].tolist() == [0, 1, 2, 0, 1, 2]
    assert (env.tasks, env.missions) == (env.inner.tasks, env.inner.missions)
    assert {"direction", "mission"} <= set(step)


def test_sizes_are_handed_to_the_inner_environment_or_taken_from_it():
    assert Trials(lambda **o: GridNavi(**{"num_envs": 7, **o})).batch_size == (7,)
    assert Trials(lambda **o: GridNavi(**{"num_envs": 7, **o}), num_envs=3).batch_size == (3,)


def test_a_recipe_names_the_inner_environment_with_its_arguments():
    class Data:
        def __init__(self, env: Callable[[], BatchedEnv]):
            self.env = env

    parser = ArgumentParser()
    parser.add_class_arguments(Data, "data")
    inner = {"class_path": "GridNavi", "init_args": {"num_envs": 8, "size": 4}}
    recipe = {"env": {"class_path": "Trials", "init_args": {"episodes": 4, "env": inner}}}
    env = parser.instantiate(parser.parse_object({"data": recipe})).data.env(num_envs=5, device="cpu")
    assert (env.batch_size, env.horizon, env.inner.size) == ((5,), 60, 4)


def test_an_environment_that_cannot_be_saved_begins_new_trials():
    class Opaque(Bandit):
        def reset(self, *, seed=None, options=None):
            # Hidden from whoever looks for plain data.
            self.hidden = iter(range(1000))
            return super().reset(seed=seed)

        def step(self, action):
            step, _, *rest = super().step(action)
            return step, float(next(self.hidden)), *rest

    gymnasium.register("Opaque-v0", Opaque, max_episode_steps=5)
    try:
        env = Trials(lambda **o: Gym("Opaque-v0", **o), 2, num_envs=2)
        assert not env.exact
        assert env.why_not_exact == (
            "Gym('Opaque-v0') has state that is not plain data, so that a resumed run begins new episodes"
        )
        env.begin()
        env.advance(torch.tensor([0, 0]))
        env.load_state(env.save_state())
        assert env.current["is_init"].all()
        assert env.current["observation"].tolist() == [[0, 1]] * 2
    finally:
        del gymnasium.registry["Opaque-v0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env": Pendulum}, "data.env: Trials needs an environment with tasks; Pendulum has none"),
        ({"env": GridNavi, "episodes": 0}, "Trials.episodes is 0; it must be a whole number from 1"),
        ({"env": GridNavi, "boundary": "x"}, "Trials.boundary is 'x'; it must be one of first, last"),
    ],
)
def test_bad_options_name_the_key(options, message):
    with pytest.raises(ValueError, match=message):
        Trials(**options)
