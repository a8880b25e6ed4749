"""PPO over many tasks, and what the episodic memory may and may not change in it."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from lightning_hyper.algorithms import PPO, RetrievalPPO
from lightning_hyper.envs import GridNavi, MiniGrid
from lightning_hyper.experience.base import first_episodes
from lightning_hyper.experience.rollouts import Rollouts
from lightning_hyper.memory import EpisodicMemory
from lightning_hyper.modules import Spaces
from lightning_hyper.modules.retriever import AttentionRetriever
from lightning_hyper.modules.task import JoinedTask, OneHotTask, TextTask
from lightning_hyper.nn import MLP, GridEncoder, Hyper, InputOnly
from lightning_hyper.objectives import DynamicAlpha, FixedAlpha, PPOLoss

TASKS = ["MiniGrid-Empty-5x5-v0", "MiniGrid-LavaGapS5-v0", "MiniGrid-DistShift1-v0"]
HEAD = partial(MLP, hidden=[8], activation="tanh")
PARTS = {
    "encoder": partial(GridEncoder, channels=(4, 4, 8)),
    "actor": HEAD,
    "critic": HEAD,
    "task": OneHotTask,
    "decision": partial(Hyper, hidden=[]),
}


def environment(num_envs=6):
    env = MiniGrid(num_envs, tasks=TASKS, levels=8)
    env.set_seed(0)
    return env


def algorithm(env, kind=PPO, **options):
    loss = PPOLoss(clip=0.2, entropy=0.01, value=1.0, value_loss="mse")
    model = kind(**{**PARTS, "loss": loss, "gamma": 0.99, "normalize_reward": False, **options})
    torch.manual_seed(1)
    model.spaces = Spaces.of(env)
    model.build(model.spaces)
    model._optimizer = model.configure_optimizers()
    model.optimizers = lambda use_pl_optimizer=True: model._optimizer
    model.manual_backward = lambda loss: loss.backward()
    data = SimpleNamespace(env=env, steps=16)
    model._trainer = SimpleNamespace(world_size=1, global_rank=0, datamodule=data)
    model.check(env.batch_size.numel(), 16)
    return model


def retrieval(env, **options):
    retriever = partial(AttentionRetriever, **{"subset": 5, **options.pop("retriever", {})})
    return algorithm(env, RetrievalPPO, retriever=retriever, memory=EpisodicMemory(capacity=10), **options)


def with_ends(batch):
    """Episodes that end in success, early in a batch."""
    batch["next", "terminated"][:, 7] = batch["next", "done"][:, 7] = True
    batch["next", "reward"][:, 7] = torch.rand(len(batch["next", "reward"]), 1)
    batch["step_count"] = torch.arange(16).view(1, 16, 1).expand_as(batch["step_count"]) % 8
    return batch


def test_advantages_equal_torchrls_over_the_episodes_and_bootstrap_only_truncations():
    env = environment()
    model = algorithm(env, normalize_advantage=None)
    batch = with_ends(Rollouts(env, model.policy, 16, 1).collect())
    batch["next", "terminated"][:3, 7] = False  # three of six are truncated
    found = model.estimate(batch)
    observation, mission = batch["next", "observation"], batch["next", "mission"]
    with torch.no_grad():
        after = model.agent.encoder(observation.flatten(0, 1))
        after = model.agent.value(model.agent.decide(after, mission.flatten())).view(6, 16)
    reward, value = batch["next", "reward"][..., 0], batch["state_value"][..., 0]
    done, terminated = batch["next", "done"][..., 0], batch["next", "terminated"][..., 0]
    for row in range(6):
        running = 0.0
        for t in reversed(range(16)):
            live = 0.0 if terminated[row, t] else 1.0
            delta = reward[row, t] + 0.99 * live * after[row, t] - value[row, t]
            running = delta + 0.99 * 0.95 * (0.0 if done[row, t] else running)
            assert found["advantage"][row, t].item() == pytest.approx(float(running), abs=1e-5)
            assert found["target"][row, t].item() == pytest.approx(float(running + value[row, t]), abs=1e-5)


def test_advantages_are_standardised_over_each_minibatch():
    env = environment()
    model = algorithm(env, normalize_advantage="minibatch", minibatches=3, epochs=1)
    seen = []
    model.losses = lambda part: seen.append(part["advantage"]) or {"total": model.agent.actor.head.bias.sum() * 0}
    model.learn(with_ends(Rollouts(env, model.policy, 16, 1).collect()))
    assert [len(part) for part in seen] == [32] * 3
    for part in seen:
        assert part.mean().item() == pytest.approx(0, abs=1e-5)
        assert part.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_networks_have_the_papers_sizes():
    env = environment()
    task = partial(JoinedTask, parts=[OneHotTask, partial(TextTask, role=False)])
    head = partial(MLP, hidden=[64], activation="tanh")
    model = algorithm(env, encoder=GridEncoder, actor=head, critic=head, task=task)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.agent.named_children()}
    assert (sizes["encoder"], sizes["actor"], sizes["critic"]) == (10_544, 4_615, 4_225)
    # 128 -> 4096 and 128 -> 64; the paper's 571,872 are these and branches of 8 and 512 inputs.
    assert sizes["decision"] == 128 * 4096 + 4096 + 128 * 64 + 64
    one_hot, text = (8 * 32 + 32) + (32 * 64 + 64), 512 * 64 + 64
    assert sizes["decision"] + one_hot + text == 571_872


def test_returns_are_means_over_episodes_and_by_task():
    env = environment()
    model = algorithm(env)
    ends = first_episodes(env, model.policy)
    measured = model.returns(ends, "eval")
    returns = ends["next", "episode_return"].squeeze(-1)
    assert measured["eval/return"].item() == pytest.approx(returns.mean().item())
    for k, name in enumerate(TASKS):
        assert measured[f"eval/return/{name}"].item() == pytest.approx(returns[k::3].mean().item())


def test_a_memory_that_counts_for_nothing_changes_nothing():
    """Alpha 0: acting, advantages and every update are those of plain PPO, so no draw of the memory is felt."""
    batches = []
    for make in (algorithm, partial(retrieval, alpha=FixedAlpha(value=0.0))):
        env = environment()
        model = make(env, epochs=2, minibatches=4)
        rollouts = Rollouts(env, model.policy, 16, 1)
        for _ in range(3):
            batch = with_ends(rollouts.collect())
            model.learn(batch)
        batches.append((batch, model.agent.state_dict()))
    (plain, plain_state), (remembered, remembered_state) = batches
    assert len(model.memory) == 10
    assert torch.equal(plain["action"], remembered["action"])
    for key, value in plain_state.items():
        torch.testing.assert_close(value, remembered_state[key], atol=1e-6, rtol=1e-5)


def test_a_memory_that_counts_changes_the_value_loss_alone():
    env = environment()
    model = retrieval(env, alpha=DynamicAlpha())
    batch = with_ends(Rollouts(env, model.policy, 16, 1).collect())
    before = model.estimate(batch)
    model.memory.insert(model.recorder.completed(batch))
    after = model.estimate(batch)
    assert all(torch.equal(before[key], after[key]) for key in before)
    part = {key: batch[key].flatten(0, 1) for key in ("observation", "task", "mission")}
    part |= {key: entry.flatten(0, 1) for key, entry in after.items()}
    with_memory = model.losses(part)
    without = model.compare(part, model.agent.decide(model.agent.encoder(part["observation"]), part["mission"]))
    assert torch.equal(with_memory["policy"], without["policy"])
    assert not torch.equal(with_memory["value"], without["value"])
    assert 0.1 <= with_memory["alpha"] <= 1


def test_only_completed_episodes_enter_the_memory():
    env = environment()
    model = retrieval(env)
    batch = Rollouts(env, model.policy, 16, 1).collect()
    batch["next", "done"][:] = batch["next", "terminated"][:] = False
    model.learn(batch)
    assert len(model.memory) == 0
    batch["next", "done"][2, 15] = True
    batch["next", "reward"][2, 15] = 0.5
    batch["state_value"][:] = 0.25
    # The same window once more, as if it followed: the episode of environment 2 has 32 steps.
    batch["step_count"] += 16
    model.learn(batch)
    entries = model.memory.entries
    assert len(model.memory) == 10
    assert (entries["task"] == 2).all()
    assert (entries["episode_return"] == 0.5).all()


def test_a_restored_memory_gives_the_same_updates():
    env = environment()
    model = retrieval(env, retriever={"refresh": 3})
    rollouts = Rollouts(env, model.policy, 16, 1)
    batches = [with_ends(rollouts.collect()) for _ in range(3)]
    for batch in batches[:2]:
        model.learn(batch)
    other = retrieval(environment(), retriever={"refresh": 3})
    other.load_state_dict(model.state_dict())
    other._optimizer.load_state_dict(copy.deepcopy(model._optimizer.state_dict()))
    other.load_rank_state(model.rank_state())
    for each in (model, other):
        torch.manual_seed(3)
        each.learn(batches[2])
    for a, b in zip(model.agent.parameters(), other.agent.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_does_not_fit_is_named():
    env = environment()
    with pytest.raises(ValueError, match=r"model.decision is given without model.task"):
        algorithm(env, task=None)
    with pytest.raises(ValueError, match=r"model.minibatches is 7, which does not divide the 96"):
        algorithm(env, minibatches=7)
    with pytest.raises(ValueError, match=r"model.memory.capacity is 10, below the 11 entries"):
        retrieval(env, retriever={"subset": 11})
    with pytest.raises(ValueError, match=r"model.retriever.projection needs a context"):
        retrieval(env, task=None, decision=None, retriever={"projection": partial(InputOnly, hidden=[])})
    with pytest.raises(ValueError, match=r"observations that are a grid"):
        algorithm(GridNavi(4))
