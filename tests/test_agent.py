"""An agent acts in a plain loop as its policy acted in training, and leaves the caller's generators alone."""

import random
import subprocess
import sys
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces as gym
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

import lightning_hyper
from lightning_hyper.agent import Agent
from lightning_hyper.algorithms import PPO
from lightning_hyper.checkpoint_file import CheckpointError
from lightning_hyper.envs import GridNavi, Gym, MiniGrid, Trials
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.experience import Rollouts
from lightning_hyper.modules import OneHotContext, RecurrentContext, TaskContext
from lightning_hyper.nn import GRU, Concat, ConvEncoder, GridEncoder, Hyper
from lightning_hyper.parts import instantiate_model
from lightning_hyper.tracking import database

MEMORY = partial(RecurrentContext, encoder=partial(GRU, hidden=5))


class Parts(gymnasium.Env):
    """Observations of several parts, actions that count from 3."""

    observation_space = gym.Dict({"where": gym.Box(-9, 9, (2,), np.float32), "door": gym.Discrete(3, start=1)})
    action_space = gym.Discrete(4, start=3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {"where": self.np_random.normal(size=2).astype(np.float32), "door": np.int64(2)}, {}

    def step(self, action):
        assert self.action_space.contains(action)
        where = (self.np_random.normal(size=2) + action - 3).astype(np.float32)
        return {"where": where, "door": np.int64(1 + action % 3)}, float(where.sum()), False, False, {}


class Pictures(gymnasium.Env):
    """Images that depend on the actions."""

    observation_space = gym.Box(0, 255, (40, 40, 3), np.uint8)
    action_space = gym.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.integers(0, 256, (40, 40, 3), dtype=np.uint8), {}

    def step(self, action):
        picture = self.np_random.integers(0, 256, (40, 40, 3)) // (1 + action)
        return picture.astype(np.uint8), float(action), False, False, {}


for name, env in (("Parts-v0", Parts), ("Pictures-v0", Pictures)):
    if name not in gymnasium.registry:
        gymnasium.register(name, env, max_episode_steps=30)

IDS = ["CartPole-v1", "Pendulum-v1", "Parts-v0", "Pictures-v0"]


def agent(env, *, seed=6, **parts):
    """PPO's agent for an environment, with weights large enough that its actions depend on what it sees."""
    torch.manual_seed(seed)
    spaces = Spaces.of(env)
    if len(spaces.observation) == 3:
        parts["encoder"] = partial(ConvEncoder, features=16) if spaces.observation[0] == 40 else GridEncoder
    model = PPO(**{"actor": Concat, "critic": Concat, "context": MEMORY, **parts})
    model.build(spaces)
    for parameter in model.agent.parameters():
        nn.init.normal_(parameter, std=0.1 if spaces.is_image else 0.6)
    return Agent(model.policy.eval(), spaces)


def play(acting, env, steps, **options):
    """Actions, observations and rewards of a plain gymnasium loop."""
    observation, _ = env.reset(seed=5)
    acting.reset()
    reward, seen = 0.0, []
    for _ in range(steps):
        action = acting.act(observation, reward, **options)
        assert env.action_space.contains(action), action
        seen.append((observation, reward, action))
        observation, reward, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            break
    return seen


def by_policy(acting, env, seen):
    """What the policy chooses step by step, its entries made by hand from what was seen in the loop."""
    spaces, state, chosen = acting.spaces, None, []
    n = spaces.actions
    previous = torch.zeros(1, dtype=torch.int64) if spaces.discrete else torch.zeros(1, n)
    for t, (observation, reward, _) in enumerate(seen):
        shown = observation if spaces.is_image else gym.flatten(env.observation_space, observation)
        step = {
            "observation": torch.as_tensor(np.array(shown))[None],
            "previous_action": previous,
            "previous_reward": torch.tensor([[reward]], dtype=torch.float32),
            "is_init": torch.tensor([[t == 0]]),
        }
        if not spaces.is_image:
            step["observation"] = step["observation"].float()
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            out, state = acting.policy.act(step, state)
        previous = out["action"]
        chosen.append(previous[0].numpy())
    return chosen


@pytest.mark.parametrize("name", IDS)
def test_a_plain_loop_takes_the_actions_of_the_policy_step_for_step(name):
    env = gymnasium.make(name)
    acting = agent(Gym(name))
    seen = play(acting, env, 20)
    chosen = by_policy(acting, env, seen)
    space = env.action_space
    for (_, _, action), expected in zip(seen, chosen, strict=True):
        if isinstance(space, gym.Discrete):
            assert action == expected + space.start
        else:
            np.testing.assert_allclose(action, expected.clip(space.low, space.high), rtol=1e-5)
    assert len(np.unique([action for _, _, action in seen])) > 1


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "Pictures-v0"])
def test_a_batch_gets_the_actions_that_each_gets_alone(name):
    acting, env = agent(Gym(name)), gymnasium.make(name)
    rows = []
    for _ in range(3):
        env.reset(seed=len(rows))
        env.action_space.seed(len(rows))
        rows.append([env.step(env.action_space.sample())[0] for _ in range(4)])
    acting.reset()
    together = [acting.act(np.stack([row[t] for row in rows]), [0.0, 1.0, 2.0]) for t in range(4)]
    for k, row in enumerate(rows):
        acting.reset()
        for t in range(4):
            np.testing.assert_allclose(acting.act(row[t], float(k)), together[t][k], rtol=1e-5, atol=1e-5)


def test_a_batch_of_dictionaries_is_a_dictionary_of_batches():
    acting, env = agent(Gym("Parts-v0")), Parts()
    env.observation_space.seed(0)
    rows = [env.observation_space.sample() for _ in range(3)]
    together = acting.act({key: np.stack([row[key] for row in rows]) for key in rows[0]})
    assert together.shape == (3,)
    for row, action in zip(rows, together, strict=True):
        acting.reset()
        assert acting.act(row) == action


def test_lists_and_doubles_are_observations_too():
    acting = agent(Gym("CartPole-v1"))
    expected = acting.act(np.array([0.1, 0.2, -0.1, 0.3], np.float32))
    for given in ([0.1, 0.2, -0.1, 0.3], np.array([0.1, 0.2, -0.1, 0.3])):
        acting.reset()
        assert acting.act(given) == expected


@pytest.mark.parametrize("boundary", ["first", "last"])
def test_a_loop_over_trials_takes_the_actions_of_collection(boundary):
    env = Trials(partial(GridNavi, 6, episode_steps=3), boundary=boundary)
    acting = agent(env)
    env.set_seed(4)
    step, actions, expected, state = env.begin(), [], [], None
    reward = done = np.zeros(6)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        for _ in range(6):
            actions.append(acting.act(step["observation"].numpy(), reward, done))
            chosen, state = acting.policy.act(step, state)
            expected.append(chosen["action"].numpy())
            step = env.advance(chosen["action"])
            reward, done = step["reward"].squeeze(-1).numpy(), step["episode_done"].squeeze(-1).numpy()
    assert np.array_equal(actions, expected)
    assert len(np.unique(actions)) > 1


def test_an_agent_of_many_tasks_acts_in_minigrids_own_loop():
    ids = ["MiniGrid-Empty-5x5-v0", "MiniGrid-LavaGapS5-v0", "MiniGrid-DistShift1-v0"]
    acting = agent(MiniGrid(3, tasks=ids, levels=2), context=OneHotContext, actor=Hyper)
    for parameter in acting.policy.parameters():
        nn.init.normal_(parameter, std=0.3)
    env = gymnasium.make(ids[2])
    observation, _ = env.reset(seed=0)
    with pytest.raises(ValueError, match=r"is that of MiniGrid-Empty-5x5-v0, MiniGrid-DistShift1-v0: say which"):
        acting.act(observation)
    seen = set()
    for task in (0, 2):
        acting.reset(task=ids[task])
        for _ in range(5):
            action = acting.act(observation)
            x = acting.policy.observation.encoder(torch.as_tensor(observation["image"])[None])
            assert action == acting.policy.actor(x, torch.eye(3)[task : task + 1]).argmax()
            seen.add((task, int(action)))
            observation, *_ = env.step(1)
    assert len(seen) > 2
    batch = {"image": np.stack([observation["image"]] * 2), "mission": [observation["mission"]] * 2}
    acting.reset(task=[ids[2], ids[0]])
    assert acting.act(batch).shape == (2,)
    acting.reset()
    with pytest.raises(ValueError, match=r"the mission 'sing' is not one of MiniGrid-Empty-5x5-v0, "):
        acting.act({**observation, "mission": "sing"})
    with pytest.raises(ValueError, match=r"dictionary with `image` and `mission`"):
        acting.act(observation["image"])
    lava, _ = gymnasium.make(ids[1]).reset(seed=0)
    acting.act(lava)  # whose mission is of one task alone


def test_reset_forgets():
    acting, env = agent(Gym("CartPole-v1")), gymnasium.make("CartPole-v1")
    first, second = play(acting, env, 10), play(acting, env, 10)
    assert [action for _, _, action in first] == [action for _, _, action in second]
    observation = first[3][0]
    remembering = []
    for fresh in (True, False):
        if fresh:
            acting.reset()
        acting.act(observation, 5.0)
        remembering.append(acting._state.clone())
    assert not torch.equal(*remembering)


def test_the_reward_before_the_first_step_is_ignored():
    acting = agent(Gym("CartPole-v1"))
    states = []
    for reward in (0.0, 7.0):
        acting.reset()
        acting.act([0.0, 0.0, 0.0, 0.0], reward, reward > 0)
        states.append(acting._state)
    assert torch.equal(*states)


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_the_callers_generators_are_left_alone(name, deterministic):
    acting = agent(Gym(name))
    observation = gymnasium.make(name).reset(seed=0)[0]
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for _ in range(3):
        acting.act(observation, deterministic=deterministic)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_drawn_actions_are_decided_by_the_seed_and_follow_the_probabilities():
    made = agent(Gym("CartPole-v1"), context=None)
    observation = np.zeros((2000, 4), np.float32)

    def drawn(seed):
        acting = Agent(made.policy, made.spaces, seed=seed)
        return [acting.act(observation, deterministic=False) for _ in range(2)]

    first = drawn(1)
    torch.manual_seed(99)
    assert np.array_equal(first, drawn(1))
    assert not np.array_equal(first, drawn(2))
    assert not np.array_equal(first[0], first[1])
    probability = made.policy.actor(torch.zeros(1, 4), torch.zeros(1, 0)).softmax(-1)[0, 1].item()
    assert np.mean(first) == pytest.approx(probability, abs=0.04)  # 5 standard deviations


def test_an_agent_that_is_told_its_task_asks_for_it():
    acting = agent(Trials(partial(GridNavi, 2, episode_steps=3)), context=TaskContext)
    with pytest.raises(ValueError, match=r"this agent is told its task: give it with agent.reset\(task=...\)"):
        acting.act([0.0, 0.0])
    acting.reset(task=[3.0, 4.0])
    alone = acting.act([0.0, 0.0])
    acting.reset(task=[[3.0, 4.0], [1.0, 2.0]])
    assert acting.act(np.zeros((2, 2)))[0] == alone


def test_a_task_that_is_an_index_has_a_name():
    tasks = [{"max_episode_steps": 5}, {"max_episode_steps": 9}]
    acting = agent(Gym("CartPole-v1", 2, tasks=tasks), context=OneHotContext)
    observation, actions = [0.1, 0.0, 0.0, 0.0], []
    for task in (1, acting.spaces.tasks[1]):
        acting.reset(task=task)
        actions.append(acting.act(observation))
    assert actions[0] == actions[1]
    acting.reset(task="swim")
    with pytest.raises(ValueError, match=r"task is 'swim'; it must be one of"):
        acting.act(observation)


@pytest.mark.parametrize("given", [[1.0, 2.0, 3.0], np.zeros((2, 3)), np.zeros((2, 2, 4)), 1.0])
@pytest.mark.parametrize("name", ["CartPole-v1", None])
def test_a_wrong_observation_is_refused(name, given):
    acting = agent(Gym(name) if name else Trials(partial(GridNavi, 2, episode_steps=3)))
    with pytest.raises(ValueError, match=r"observation is"):
        acting.act(given)


RECIPE = {
    "model": {
        "class_path": "PPO",
        "init_args": {
            "context": {"class_path": "RecurrentContext"},
            "actor": {"class_path": "Hyper"},
            "critic": {"class_path": "Hyper"},
            "normalize_observation": True,
        },
    }
}


@pytest.fixture
def trained(tmp_path):
    """A model that learned from a batch, and its checkpoint."""
    data = Rollouts(partial(Trials, partial(GridNavi, episode_steps=3), num_envs=4), steps=6)
    data.connect()
    model = instantiate_model(RECIPE["model"])
    model.build(Spaces.of(data.env))
    data.begin(model.policy)
    model.learn(data.collect())
    path = tmp_path / "last.ckpt"
    checkpoint = {"recipe": RECIPE, "spaces": model.spaces.asdict(), "state_dict": model.state_dict()}
    torch.save({**checkpoint, "frames": 24}, path)
    return model, path


def test_a_checkpoint_brings_back_the_weights_the_normalisers_and_the_recipe(trained):
    model, path = trained
    generator = torch.get_rng_state()
    loaded = lightning_hyper.load(path)
    assert torch.equal(torch.get_rng_state(), generator)
    assert loaded.policy.observation.norm.count.item() == 24
    assert loaded.recipe == RECIPE
    assert loaded.spaces == model.spaces
    expected = Agent(model.policy, model.spaces)
    for observation in ([0.0, 0.0], [1.0, 0.0], [1.0, 1.0]):
        assert loaded.act(observation, 0.5) == expected.act(observation, 0.5)


def test_a_run_loads_by_its_mlflow_id(trained, tmp_path):
    from mlflow import MlflowClient

    model, path = trained
    root = tmp_path / "runs"
    root.mkdir()
    client = MlflowClient(database(root))
    experiment = client.create_experiment("e", artifact_location=(tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment).info.run_id
    client.log_artifact(run, str(path), "checkpoints")
    loaded = lightning_hyper.load(f"runs:/{run}", root=root)
    for a, b in zip(loaded.policy.parameters(), model.policy.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(CheckpointError, match=f"runs:/{run}/best: no such checkpoint"):
        lightning_hyper.load(f"runs:/{run}/best", root=root)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, lightning_hyper; print([m for m in ('torch', 'lightning', 'mlflow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
