"""Collected batches: whole, fresh, and carried over exactly."""

import torch
from tensordict import TensorDict

from lightning_hyper.envs import GridNavi
from lightning_hyper.experience.base import Evaluation
from lightning_hyper.experience.rollouts import Rollouts, whole_trials


def test_a_batch_has_its_entries_by_environment_and_time(tiny_agent):
    batch = Rollouts(GridNavi(6), tiny_agent(), 60, 1).collect()
    assert batch.batch_size == torch.Size([6])
    assert batch["observation"].shape == (6, 60, 2)
    assert batch["hidden"].shape == (6, 8)
    assert batch["next", "hidden"].shape == (6, 60, 8)
    assert batch["next", "done"][:, -1].all()


def test_torchrl_still_carries_its_state_where_we_take_it_from(tiny_agent):
    rollouts = Rollouts(GridNavi(6), tiny_agent(), 7, 1)
    assert isinstance(rollouts.collector._carrier, TensorDict)
    batch = rollouts.collect()
    carried = rollouts.collector._carrier
    assert torch.equal(carried["observation"], batch["next", "observation"][:, -1])
    assert torch.equal(carried["hidden"], batch["next", "hidden"][:, -1])


def test_hidden_state_crosses_batches(tiny_agent):
    rollouts = Rollouts(GridNavi(6), tiny_agent(), 7, 1)
    first, second = rollouts.collect(), rollouts.collect()
    assert not first["hidden"].any()
    assert torch.equal(second["hidden"], first["next", "hidden"][:, -1])
    assert second["hidden"].any()


def test_nothing_is_collected_before_it_is_asked_for(tiny_agent):
    agent = tiny_agent()
    rollouts = Rollouts(GridNavi(64), agent, 60, 3)
    for index, batch in enumerate(rollouts):
        with torch.no_grad():  # the policy that acts in the next batch is the one left behind here
            for parameter in agent.actor.parameters():
                parameter.zero_()
        if index:
            probability = batch["log_prob"].exp()
            torch.testing.assert_close(probability, torch.full_like(probability, 0.2))


def test_restored_collection_goes_on_exactly(tiny_agent):
    agent = tiny_agent()
    rollouts = Rollouts(GridNavi(6), agent, 7, 1)
    for _ in range(10):
        rollouts.collect()
    state, generator = rollouts.state_dict(), torch.get_rng_state()
    expected = [rollouts.collect() for _ in range(3)]
    other = Rollouts(GridNavi(6), agent, 7, 1)
    other.load_state_dict(state)
    torch.set_rng_state(generator)
    for batch in expected:
        again = other.collect()
        assert (batch == again).all()


def test_evaluation_repeats_itself_and_leaves_the_generators_alone(tiny_agent):
    env, agent = GridNavi(16), tiny_agent()
    evaluation = Evaluation(env, lambda: whole_trials(env, agent), 5, deterministic=False)
    before = torch.get_rng_state()
    (first,), (second,) = list(evaluation), list(evaluation)
    assert (first == second).all()
    assert torch.equal(torch.get_rng_state(), before)


def test_deterministic_evaluation_takes_the_most_likely_action(tiny_agent):
    env, agent = GridNavi(16), tiny_agent()
    (batch,) = Evaluation(env, lambda: whole_trials(env, agent), 5, deterministic=True)
    x = agent.inputs(batch)
    c, _ = agent.contexts(batch, None)
    assert torch.equal(agent.policy(x, c).probs.argmax(-1), batch["action"])
