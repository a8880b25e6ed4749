"""A loaded agent acts in a plain loop as it acted in training."""

import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from torchrl.envs.utils import ExplorationType, set_exploration_type

import lightning_hyper
from lightning_hyper.checkpoint_file import CheckpointError
from lightning_hyper.envs import GridNavi

TINY_TD3 = Path(__file__).parent / "tiny_td3.yaml"
TINY_RETRIEVAL = Path(__file__).parent / "tiny_retrieval.yaml"


@pytest.fixture
def trained(tiny):
    assert tiny("fit", "--run", "a", "--frames", "320") == 0
    return Path("runs/tiny/a/checkpoints/last.ckpt")


def play(agent, env, steps):
    """Actions in a plain loop that knows nothing of tensordicts but the environment's own."""
    step, reward, done, actions = env.reset(), np.zeros(env.batch_size[0]), np.zeros(env.batch_size[0]), []
    agent.reset()
    for _ in range(steps):
        actions.append(agent.act(step["observation"].numpy(), reward, done))
        step["action"] = torch.as_tensor(actions[-1])
        step = env.step(step)["next"]
        reward, done = step["reward"].squeeze(-1).numpy(), step["episode_done"].squeeze(-1).numpy()
    return np.stack(actions, 1)


def test_plain_loop_takes_the_actions_of_the_trainers_evaluation(trained):
    agent = lightning_hyper.load(trained)
    env = GridNavi(8, episodes=2, episode_steps=5)
    env.set_seed(4)
    actions = play(agent, env, 10)
    env.set_seed(4)
    with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
        batch = env.rollout(10, agent.policy, break_when_any_done=False)
    assert actions.tolist() == batch["action"].tolist()
    assert len(np.unique(actions)) > 1


def test_a_multi_task_agent_acts_in_minigrids_own_loop(tiny):
    assert tiny("fit", "--run", "a", recipe=TINY_RETRIEVAL) == 0
    agent = lightning_hyper.load("runs/tiny/a/checkpoints/last.ckpt")
    env = gymnasium.make("MiniGrid-DistShift1-v0")
    observation, _ = env.reset(seed=0)
    with pytest.raises(ValueError, match=r"is that of MiniGrid-Empty-5x5-v0, MiniGrid-DistShift1-v0: say which"):
        agent.act(observation)
    agent.reset(task="MiniGrid-DistShift1-v0")
    for _ in range(5):
        action = agent.act(observation)
        image = torch.as_tensor(observation["image"]).unsqueeze(0)
        decided = agent.policy.decide(agent.policy.encoder(image), torch.tensor([2]))
        assert action == agent.policy.policy(decided).mode.item()
        observation, *_ = env.step(1)
    batch = {"image": np.stack([observation["image"]] * 2), "mission": [observation["mission"]] * 2}
    agent.reset(task=["MiniGrid-DistShift1-v0", "MiniGrid-Empty-5x5-v0"])
    assert agent.act(batch).shape == (2,)
    agent.reset()
    with pytest.raises(ValueError, match=r"the mission 'sing' is not one of MiniGrid-Empty-5x5-v0, "):
        agent.act({**observation, "mission": "sing"})
    with pytest.raises(ValueError, match=r"dictionary with `image` and `mission`"):
        agent.act(observation["image"])


def test_an_off_policy_agent_acts_in_gymnasiums_own_loop(tiny):
    assert tiny("fit", "--run", "a", recipe=TINY_TD3) == 0
    agent = lightning_hyper.load("runs/tiny/a/checkpoints/last.ckpt")
    env = gymnasium.make("InvertedPendulum-v5")
    observation, _ = env.reset(seed=0)
    actions, over = [], False
    while not over:
        actions.append(agent.act(observation))
        expected = 3 * torch.tanh(agent.policy.network(torch.as_tensor(observation, dtype=torch.float32)))
        np.testing.assert_allclose(actions[-1], expected.detach().numpy(), rtol=1e-6)
        observation, _, terminated, truncated, _ = env.step(actions[-1])
        over = terminated or truncated
    assert len(np.unique(actions)) > 1
    assert env.action_space.contains(actions[0])


def test_one_environment_alone_gets_the_action_that_it_gets_in_a_batch(trained):
    agent = lightning_hyper.load(trained)
    agent.reset()
    many = agent.act(np.array([[0.0, 0.0], [3.0, 1.0]]))
    agent.reset()
    assert agent.act([3.0, 1.0]) == many[1]


def test_normalisers_come_back(trained):
    agent = lightning_hyper.load(trained)
    assert agent.policy.norm.count.item() == 320


def test_a_run_loads_by_its_mlflow_id(trained):
    run_id = torch.load(trained, weights_only=True)["run_id"]
    by_path, by_run = lightning_hyper.load(trained), lightning_hyper.load(f"runs:/{run_id}")
    for a, b in zip(by_path.policy.parameters(), by_run.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_reset_forgets(trained):
    agent = lightning_hyper.load(trained)
    agent.act([0.0, 0.0])
    first = agent._hidden.clone()
    agent.act([4.0, 4.0], 1.0)
    assert not torch.equal(agent._hidden, first)
    agent.reset()
    agent.act([0.0, 0.0])
    assert torch.equal(agent._hidden, first)


def test_wrong_observation_is_refused(trained):
    with pytest.raises(ValueError, match="this agent takes"):
        lightning_hyper.load(trained).act([1.0, 2.0, 3.0])


def test_oracle_asks_for_the_task(tiny):
    oracle = Path("oracle.yaml")
    oracle.write_text(
        f"layers: [{Path(__file__).parent / 'tiny.yaml'}]\n"
        "model: {class_path: MetaPPO, init_args: {context: {class_path: OracleContext}}}\n"
    )
    assert tiny("fit", "--run", "o", "--frames", "160", recipe=oracle) == 0
    agent = lightning_hyper.load("runs/tiny/o/checkpoints/last.ckpt")
    with pytest.raises(ValueError, match="give it with agent"):
        agent.act([0.0, 0.0])
    agent.reset(task=[3.0, 4.0])
    assert agent.act([0.0, 0.0]) in range(5)


def test_missing_truncated_and_foreign_checkpoints_are_told_apart(trained, tmp_path):
    with pytest.raises(CheckpointError, match="no file"):
        lightning_hyper.load(tmp_path / "none.ckpt")
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(trained.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="truncated"):
        lightning_hyper.load(cut)
    torch.save({"weights": torch.zeros(1)}, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match="not written by lightning-hyper"):
        lightning_hyper.load(tmp_path / "foreign.ckpt")


def test_importing_the_package_imports_nothing_heavy():
    import subprocess

    code = "import sys, lightning_hyper; print([m for m in ('torch', 'lightning', 'mlflow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
