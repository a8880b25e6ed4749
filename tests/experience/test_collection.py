"""Collected batches equal TorchRL's own stepping, and go on exactly from one to the next."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type, step_mdp

from lightning_hyper.envs import GridNavi, Gym, MiniGrid, Pendulum, Trials
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.experience import Collection, first_episodes
from lightning_hyper.modules import ActorCritic, OneHotContext, RecurrentContext
from lightning_hyper.nn import GRU, Concat, GridEncoder, Hyper

MEMORY = partial(RecurrentContext, encoder=partial(GRU, hidden=5))
# Episodes that are truncated and such as terminate, of different lengths.
CARTPOLE = partial(Gym, "CartPole-v1", 4, arguments={"max_episode_steps": 11})
TRIALS = partial(Trials, partial(GridNavi, 4, episode_steps=3))
MINIGRID = partial(MiniGrid, 4, tasks=["MiniGrid-Empty-5x5-v0", "MiniGrid-LavaGapS5-v0"], levels=4)
GRID = partial(GridEncoder, channels=(4, 4, 6))

WORLDS = {
    "frames": (CARTPOLE, {}),
    "memory": (CARTPOLE, {"context": MEMORY, "actor": Hyper}),
    "real actions": (partial(Pendulum, 4, episode_steps=7), {"context": MEMORY}),
    "trials": (TRIALS, {"context": MEMORY}),
    "trials, last": (partial(TRIALS, boundary="last"), {"context": partial(MEMORY, first_step="zero")}),
    "images": (MINIGRID, {"encoder": GRID, "context": [OneHotContext, MEMORY]}),
}


def world(name, seed=3):
    make, parts = WORLDS[name]
    env = make()
    env.set_seed(seed)
    torch.manual_seed(1)
    agent = ActorCritic(Spaces.of(env), **{"actor": Concat, "critic": Concat, **parts})
    for parameter in agent.parameters():
        nn.init.normal_(parameter, std=0.8)
    return env, agent


def collection(env, agent, steps, **options):
    return Collection(env, agent, steps, value=agent.value_of, **options)


def rollout(env, agent, steps):
    """Steps by TorchRL's `step`, `step_mdp` and `maybe_reset`, the agent as a tensordict module."""
    tensordict, found = env.reset(), []
    stateful = bool(agent.state_features)
    if stateful:
        tensordict["context_state"] = torch.zeros(*env.batch_size, agent.state_features)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        for _ in range(steps):
            before = tensordict["context_state"] if stateful else None
            tensordict = env.step(agent(tensordict))
            found.append(tensordict.clone())
            after = tensordict.get("context_state", None)
            if stateful:
                found[-1]["context_state"] = before
                found[-1]["next", "context_state"] = after
            tensordict = env.maybe_reset(step_mdp(tensordict))
            if stateful:
                tensordict["context_state"] = after
    return torch.stack(found, 1)


@pytest.mark.parametrize("name", WORLDS)
def test_a_batch_equals_torchrls_stepping_with_resets_inside(name):
    env, agent = world(name)
    torch.manual_seed(7)
    batch = collection(env, agent, 30, keep_states=True).collect()
    env, agent = world(name)
    torch.manual_seed(7)
    expected = rollout(env, agent, 30)
    assert batch["next", "done"][:, :-1].any() or name == "images"
    for key in expected.keys(include_nested=True, leaves_only=True):
        if key in ("done", "terminated", "truncated", ("next", "context_state")):
            continue  # TorchRL's root has them too
        torch.testing.assert_close(batch[key], expected[key], msg=str(key))
    # What follows each step, each evaluated by itself.
    after, state = expected["next"], expected.get(("next", "context_state"), None)
    for t in range(30):
        with torch.no_grad():
            step = {key: after[key][:, t] for key in agent.window_keys}
            value = agent.value_of(step, None if state is None else state[:, t])
        counts = ~after["terminated"][:, t]
        torch.testing.assert_close(batch["next_value"][:, t][counts], value[counts], atol=1e-5, rtol=1e-4)


def test_a_world_here_has_terminations_and_truncations_at_different_times():
    env, agent = world("frames")
    after = collection(env, agent, 30).collect()["next"]
    assert after["terminated"].any()
    assert after["truncated"].any()
    assert len(after["done"].squeeze(-1).nonzero()[:, 1].unique()) > 3


@pytest.mark.parametrize("name", WORLDS)
def test_batches_follow_each_other_as_one(name):
    env, agent = world(name)
    torch.manual_seed(7)
    whole = collection(env, agent, 24).collect()
    env, agent = world(name)
    torch.manual_seed(7)
    parts = collection(env, agent, 8)
    first, second, third = (parts.collect() for _ in range(3))
    ends = [(first, second), (second, third)]
    for key in whole.keys(include_nested=True, leaves_only=True):
        if key not in ("context_state", "next_value"):
            assert torch.equal(torch.cat([first[key], second[key], third[key]], 1), whole[key]), key
    for before, after in ends:
        going_on = ~before["next", "done"][:, -1]
        torch.testing.assert_close(before["next_value"][:, -1][going_on], after["state_value"][:, 0][going_on])
    if agent.state_features:
        assert not first["context_state"].any()
        assert torch.equal(first["context_state"], whole["context_state"])
        assert second["context_state"].shape == (4, agent.state_features)


def test_the_state_before_a_batch_is_that_from_which_its_window_is_encoded_again():
    env, agent = world("memory")
    batches = collection(env, agent, 7)
    batches.collect()
    batch = batches.collect()
    assert not batch["is_init"][:, 0].all()
    with torch.no_grad():
        x, contexts, _ = agent.encode(batch, batch["context_state"])
        policy, value = agent.heads(x.flatten(0, 1), contexts.flat())
    torch.testing.assert_close(value, batch["state_value"].flatten(0, 1))
    torch.testing.assert_close(policy.log_prob(batch["action"].flatten()), batch["log_prob"].flatten())


def test_kept_states_are_those_before_each_step():
    env, agent = world("memory")
    torch.manual_seed(7)
    kept = collection(env, agent, 15, keep_states=True).collect()["context_state"]
    env, agent = world("memory")
    torch.manual_seed(7)
    singly = collection(env, agent, 1)
    for t in range(15):
        assert torch.equal(singly.collect()["context_state"], kept[:, t])


@pytest.mark.parametrize("name", WORLDS)
def test_a_restored_collection_goes_on_bit_for_bit_in_the_middle_of_episodes(name):
    env, agent = world(name)
    batches = collection(env, agent, 5)
    for _ in range(2):
        batches.collect()
    state, generator = copy.deepcopy(batches.save_state()), torch.get_rng_state()
    assert (env.current["step_count"] > 0).any()
    expected = [batches.collect() for _ in range(4)]
    other, _ = world(name, seed=99)
    again = collection(other, agent, 5)
    again.load_state(state)
    torch.set_rng_state(generator)
    for batch in expected:
        assert (again.collect() == batch).all()


def test_a_state_before_anything_was_collected_goes_on_exactly_too():
    env, agent = world("memory")
    batches = collection(env, agent, 5)
    state, generator = copy.deepcopy(batches.save_state()), torch.get_rng_state()
    expected = batches.collect()
    again = collection(world("memory", seed=99)[0], agent, 5)
    again.load_state(state)
    torch.set_rng_state(generator)
    assert (again.collect() == expected).all()


def test_without_a_value_there_is_none():
    env, agent = world("frames")
    assert "next_value" not in Collection(env, agent, 5).collect().keys()  # noqa: SIM118  TensorDict's keys


def test_a_batch_has_no_gradient():
    env, agent = world("memory")
    batch = collection(env, agent, 5).collect()
    assert not any(entry.requires_grad for entry in batch.values(include_nested=True, leaves_only=True))


def first_by_loop(env, agent, mode):
    """Return, length and return by episode of each environment's first episode, one step at a time."""
    step, state, n = env.begin(), None, env.batch_size[0]
    found, episodes = {}, [[0.0] for _ in range(n)]
    with torch.no_grad(), set_exploration_type(mode):
        while len(found) < n:
            chosen, state = agent.act(step, state)
            step = env.advance(chosen["action"])
            for k in set(range(n)) - found.keys():
                episodes[k][-1] += step["reward"][k].item()
                if step["done"][k]:
                    found[k] = (sum(episodes[k]), step["step_count"][k].item())
                elif "episode_done" in step and step["episode_done"][k]:
                    episodes[k].append(0.0)
    return [found[k] for k in range(n)], episodes


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", WORLDS)
def test_the_first_episode_of_each_environment_is_measured_whole_and_once(name, deterministic):
    env, agent = world(name)
    torch.manual_seed(7)
    ends = first_episodes(env, agent, deterministic=deterministic)
    env.set_seed(3)
    torch.manual_seed(7)
    mode = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
    totals, episodes = first_by_loop(env, agent, mode)
    assert ends["episode_return"].flatten().tolist() == pytest.approx([total for total, _ in totals], abs=1e-4)
    assert ends["step_count"].flatten().tolist() == [length for _, length in totals]
    assert ends["done"].all()
    assert ("by_episode" in ends) == ("trials" in name)
    if "trials" in name:
        assert ends["by_episode"].shape == (4, 2)
        torch.testing.assert_close(ends["by_episode"], torch.tensor(episodes))
    assert ("task" in ends) == env.has_tasks


def test_the_task_of_an_episode_is_the_one_that_it_was_of():
    env, agent = world("trials")
    ends = first_episodes(env, agent, deterministic=True)
    env.set_seed(3)
    assert torch.equal(ends["task"], env.begin()["task"])
