"""On-policy experience: sizes, seeds, and an evaluation that training does not feel."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from lightning_hyper.checks import RecipeError
from lightning_hyper.envs import GridNavi, Gym, MiniGrid, Pendulum, Trials
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.experience import Rollouts
from lightning_hyper.modules import ActorCritic, RecurrentContext
from lightning_hyper.nn import GRU, Concat, GridEncoder

MEMORY = partial(RecurrentContext, encoder=partial(GRU, hidden=5))
TRIALS = partial(Trials, partial(GridNavi, episode_steps=3), num_envs=6)
CARTPOLE = partial(Gym, "CartPole-v1", num_envs=4, arguments={"max_episode_steps": 12})


def rollouts(env=TRIALS, *, seed=0, rank=0, ranks=1, agent=None, **options):
    """Rollouts that are ready to collect, and the agent that acts."""
    made = Rollouts(env, **options)
    made.connect(seed=seed, rank=rank, ranks=ranks)
    if agent is None:
        torch.manual_seed(1)
        spaces = Spaces.of(made.env)
        encoder = partial(GridEncoder, channels=(4, 4, 6)) if spaces.is_image else None
        agent = ActorCritic(spaces, actor=Concat, critic=Concat, context=MEMORY, encoder=encoder)
        for parameter in agent.parameters():
            nn.init.normal_(parameter, std=0.3)
    made.begin(agent)
    return made, agent


def test_a_batch_has_its_entries_by_environment_and_time():
    made, _ = rollouts(steps=4)
    batch = made.collect()
    assert batch["observation"].shape == (6, 4, 2)
    assert batch["next", "done"].shape == batch["state_value"].shape == batch["next_value"].shape == (6, 4, 1)
    assert batch["action"].shape == batch["log_prob"].shape == (6, 4)
    assert batch["context_state"].shape == (6, 5)


@pytest.mark.parametrize(("env", "frames"), [(TRIALS, 6), (CARTPOLE, 12), (partial(Pendulum, episode_steps=9), 9)])
def test_without_steps_a_batch_is_the_longest_episode_or_a_whole_trial(env, frames):
    made, _ = rollouts(env, steps=None)
    assert made.steps == frames
    batch = made.collect()
    assert batch["observation"].shape[1] == frames
    if env is TRIALS:
        assert batch["next", "done"][:, -1].all()
        assert not batch["next", "done"][:, :-1].any()


def test_a_policy_that_asks_for_it_gets_its_state_before_each_step():
    made, agent = rollouts(steps=4)
    agent.keep_states = True
    made.begin(agent)
    assert made.collect()["context_state"].shape == (6, 4, 5)


def test_ranks_and_seeds_have_episodes_of_their_own():
    def goals(**options):
        return rollouts(**options)[0].collect()["task"][:, 0].tolist()

    assert goals(seed=5) == goals(seed=5)
    assert goals(seed=5) != goals(seed=6)
    assert goals(seed=5) != goals(seed=5, rank=1, ranks=2)


def test_nothing_is_collected_before_it_is_asked_for():
    made, agent = rollouts(steps=4)
    batches = made.train_dataloader()
    assert len(batches) > 1_000_000
    for index, batch in zip(range(3), batches, strict=False):
        if index:  # the policy that acts in a batch is the one left behind by the last
            torch.testing.assert_close(batch["log_prob"].exp(), torch.full((6, 4), 0.2))
        with torch.no_grad():
            for parameter in agent.actor.parameters():
                parameter.zero_()


def test_a_restored_experience_goes_on_exactly():
    made, agent = rollouts(CARTPOLE, steps=5)
    made.collect()
    state, generator = copy.deepcopy(made.save_state()), torch.get_rng_state()
    expected = [made.collect() for _ in range(3)]
    other, _ = rollouts(CARTPOLE, steps=5, seed=9, agent=agent)
    other.load_state(state)
    torch.set_rng_state(generator)
    for batch in expected:
        assert (other.collect() == batch).all()


@pytest.mark.parametrize("mode", ["deterministic", "sampled"])
@pytest.mark.parametrize("env", [TRIALS, CARTPOLE, partial(MiniGrid, tasks=["MiniGrid-Empty-5x5-v0"], levels=4)])
def test_an_evaluation_changes_nothing_and_repeats_itself(env, mode):
    made, agent = rollouts(env, steps=5, eval_envs=5, eval_mode=mode)
    alone, _ = rollouts(env, steps=5, agent=agent)
    torch.manual_seed(3)
    for _ in range(2):
        made.collect()
    generator, state = torch.get_rng_state(), copy.deepcopy(made.save_state())
    metrics = [made.evaluate(agent) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), generator)
    assert metrics[0] == metrics[1]
    now = made.save_state()
    assert torch.equal(now["env"]["generator"], state["env"]["generator"])
    assert torch.equal(now["state"]["policy"], state["state"]["policy"])
    batch = made.collect()
    torch.manual_seed(3)
    for _ in range(2):
        alone.collect()
    assert (alone.collect() == batch).all()


def test_a_test_has_other_episodes_than_an_evaluation():
    made, agent = rollouts(CARTPOLE, eval_envs=8, eval_mode="sampled")
    made.policy = agent
    (evaluated,), (tested,) = list(made.val_dataloader()), list(made.test_dataloader())
    assert {key.partition("/")[0] for key in evaluated} == {"eval"}
    assert {key.partition("/")[0] for key in tested} == {"test"}
    assert evaluated["eval/return"] != tested["test/return"]


def test_ranks_evaluate_other_episodes():
    (one, agent), (two, _) = (rollouts(CARTPOLE, eval_envs=8, eval_mode="sampled", rank=rank) for rank in (0, 1))
    assert one.evaluate(agent)["eval/return"] != two.evaluate(agent)["eval/return"]


def test_a_sampled_evaluation_draws_its_actions():
    (most_likely, agent), (drawn, _) = (
        rollouts(partial(Pendulum, episode_steps=9), eval_envs=8, eval_mode=mode)
        for mode in ("deterministic", "sampled")
    )
    seen = []
    agent.actor.register_forward_hook(lambda *_: seen.append(torch.get_rng_state()))
    most_likely.evaluate(agent)
    assert all(torch.equal(state, seen[0]) for state in seen)
    seen.clear()
    drawn.evaluate(agent)
    assert not torch.equal(seen[0], seen[1])


class Up:
    """Always goes up, and remembers the goals that it was not told."""

    def act(self, step, state):
        if step["is_init"].all():
            self.goals = step["task"].tolist()
        return {"action": torch.ones(len(step["task"]), dtype=torch.int64)}, None


def test_returns_of_an_evaluation_are_those_of_the_episodes():
    made, _ = rollouts(partial(Trials, partial(GridNavi, episode_steps=6)), steps=3, eval_envs=60)
    policy = Up()
    metrics = {key: value.item() for key, value in made.evaluate(policy).items()}
    cells = [(0, min(t, 4)) for t in range(1, 7)]
    of_each = [sum(1.0 if cell == tuple(goal) else -0.1 for cell in cells) for goal in policy.goals]
    mean = sum(of_each) / 60
    assert mean > -0.6  # some goals lie on its way
    expected = {"eval/return": 2 * mean, "eval/episode_length": 12, "eval/episode_1": mean, "eval/episode_2": mean}
    assert metrics == pytest.approx(expected, abs=1e-5)


def test_an_evaluation_of_as_many_trials_as_there_are_goals_measures_each_once():
    made, _ = rollouts(TRIALS, steps=3, eval_envs=21)
    policy = Up()
    for _ in range(2):
        made.evaluate(policy)
        assert len({tuple(goal) for goal in policy.goals}) == 21


def test_returns_of_tasks_have_their_names():
    ids = ["MiniGrid-Empty-5x5-v0", "MiniGrid-LavaGapS5-v0"]
    made, agent = rollouts(partial(MiniGrid, num_envs=2, tasks=ids, levels=4), eval_envs=4)
    metrics = made.evaluate(agent)
    by_task = [metrics[f"eval/return/{task}"] for task in ids]
    assert metrics["eval/return"].item() == pytest.approx(sum(by_task).item() / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"Rollouts.steps is 0; it must be a whole number from 1"),
        ({"evaluate_every": 0}, r"Rollouts.evaluate_every is 0"),
        ({"eval_envs": 0}, r"Rollouts.eval_envs is 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(RecipeError, match=message):
        Rollouts(TRIALS, **options)
