"""What enters an episodic memory, what leaves it, and that a state keeps all of it."""

import pytest
import torch
from tensordict import TensorDict

from lightning_hyper.checks import RecipeError
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.memory import BestReturn, EpisodicMemory, Newest, Rule, TaskQuota, Uniform

SPACES = Spaces((2,), 4, True, tasks=("a", "b", "c"))


def new(values, tasks=None, returns=None, critic=0.0):
    values = torch.tensor(values, dtype=torch.float32)
    n = len(values)
    tasks = torch.zeros(n, dtype=torch.int64) if tasks is None else torch.tensor(tasks)
    return TensorDict(
        {
            "observation": torch.arange(n).view(n, 1).expand(n, 2).float() + values.unsqueeze(-1),
            "value": values,
            "state_value": torch.full((n, 1), critic),
            "task": tasks,
            "episode_return": values if returns is None else torch.tensor(returns),
        },
        batch_size=[n],
    )


def memory(seed=0, **options):
    made = EpisodicMemory(**{"capacity": 5, "recentre": False, **options})
    made.begin(SPACES, seed, ["observation", "task", "state_value"])
    return made


def values(held):
    return held.at(held.draw())["value"].tolist()


def test_uniform_draws_with_replacement_and_overwrites_the_oldest():
    held = memory()
    assert len(held) == len(held.draw()) == len(held.draw(3)) == 0
    held.insert(new([1.0, 2.0, 3.0]))
    assert len(held) == 3
    assert set(values(held)) <= {1.0, 2.0, 3.0}
    held.insert(new([4.0, 5.0, 6.0]))
    assert len(held) == 5
    # 3 + 3 entries in 5 places: the first written is gone, the other two of the first insertion stay.
    assert sum(v <= 3 for v in values(held)) == 2
    held.insert(new([float(v) for v in range(10, 110)]))
    assert min(values(held)) >= 10
    repeats = 0
    for seed in range(50):
        fresh = memory(seed)
        fresh.insert(new([float(v) for v in range(10)]))
        repeats += len(set(values(fresh))) < 5
    # Five draws from ten with replacement are all different with probability 0.30.
    assert 25 <= repeats <= 45


def test_newest_keeps_the_last_entries_in_order():
    held = memory(rule=Newest())
    held.insert(new([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]))
    assert sorted(values(held)) == [3, 4, 5, 6, 7]
    held.insert(new([8.0, 9.0]))
    assert sorted(values(held)) == [5, 6, 7, 8, 9]


def test_best_return_keeps_the_entries_of_the_best_episodes():
    held = memory(rule=BestReturn())
    held.insert(new([1.0, 2.0, 3.0], returns=[0.5, 0.9, 0.1]))
    held.insert(new([4.0, 5.0, 6.0, 7.0], returns=[0.8, 0.0, 0.7, 0.6]))
    assert sorted(values(held)) == [1, 2, 4, 6, 7]
    held.insert(new([8.0], returns=[0.05]))
    assert sorted(values(held)) == [1, 2, 4, 6, 7]


def test_task_quota_leaves_every_task_its_share():
    held = memory(rule=TaskQuota(), capacity=6)
    held.insert(new([1.0] * 50, tasks=[0] * 50))
    held.insert(new([2.0], tasks=[1]))
    held.insert(new([3.0] * 9, tasks=[2] * 9))
    held.insert(new([4.0] * 50, tasks=[0] * 50))
    assert sorted(values(held)) == [2, 3, 3, 4, 4]


def test_a_users_own_rule_serves():
    class First(Rule):
        """Only what fits, and nothing ever leaves."""

        def choose(self, new, held, stamps, generator):
            free = (stamps == 0).nonzero().flatten()[: len(new)]
            return free, torch.arange(len(free))

    held = memory(rule=First())
    held.insert(new([1.0, 2.0, 3.0]))
    held.insert(new([4.0, 5.0, 6.0]))
    assert values(held) == [1, 2, 3, 4, 5]


def test_an_entry_stays_together():
    held = memory(rule=Newest())
    offered = new([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], tasks=[0, 1, 2, 0, 1, 2, 0])
    held.insert(offered)
    for place in held.draw().tolist():
        entry = held.at(torch.tensor([place]))[0]
        (row,) = (offered["value"] == entry["value"]).nonzero().flatten()
        assert torch.equal(entry["observation"], offered["observation"][row])
        assert entry["task"] == offered["task"][row]
    assert "state_value" not in held.entries


def test_values_are_recentred_to_the_critics_mean():
    held = memory(recentre=True, rule=Newest())
    held.insert(new([1.0, 2.0, 6.0], critic=10.0))
    assert sorted(values(held)) == pytest.approx([8, 9, 13])


def test_nothing_new_changes_nothing():
    held = memory(recentre=True)
    held.insert(new([]))
    assert held.entries is None
    held.insert(new([1.0, 2.0]))
    before = values(held)
    held.insert(new([]))
    assert values(held) == before


def test_a_subset_is_drawn_without_replacement_and_evenly():
    held = memory(rule=Newest())
    held.insert(new([1.0, 2.0, 3.0, 4.0, 5.0]))
    counts = torch.zeros(5)
    for _ in range(1000):
        places = held.draw(2)
        assert len(set(places.tolist())) == 2
        counts[places] += 1
    assert (counts - 400).abs().max() < 80  # 5 standard deviations are 77
    assert len(held.draw(9)) == len(held.draw()) == 5


@pytest.mark.parametrize("rule", [Uniform, Newest, BestReturn, TaskQuota])
def test_a_restored_memory_goes_on_exactly(rule):
    held, other = memory(rule=rule()), memory(seed=9, rule=rule())
    held.insert(new([1.0, 5.0, 3.0, 2.0, 8.0, 7.0], tasks=[0, 1, 2, 0, 1, 2]))
    held.draw(2)
    other.load_state(held.save_state())
    for batch in (new([4.0, 9.0], tasks=[1, 0]), new([6.0, 0.0, 2.5], tasks=[2, 2, 1])):
        held.insert(batch)
        other.insert(batch)
        assert torch.equal(held.draw(3), other.draw(3))
        assert values(held) == values(other)
        assert torch.equal(held.entries["observation"], other.entries["observation"])
        assert torch.equal(held.stamps, other.stamps)


def test_a_saved_state_does_not_change_afterwards():
    held = memory(rule=Newest())
    held.insert(new([1.0, 2.0]))
    state = held.save_state()
    held.insert(new([3.0, 4.0, 5.0, 6.0]))
    other = memory(rule=Newest())
    other.load_state(state)
    assert values(other) == [1, 2]


def test_the_global_generator_is_left_alone_and_the_seed_decides():
    before = torch.get_rng_state()
    drawn = []
    for seed in (3, 3, 4):
        held = memory(seed)
        held.insert(new([float(v) for v in range(40)]))
        drawn.append((values(held), held.draw(2).tolist()))
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn[0] == drawn[1] != drawn[2]


def checkpoint(path, algorithm, spaces=SPACES):
    """What another run's memory needs of a run's checkpoint."""
    checkpoint = {"recipe": {}, "spaces": spaces.asdict(), "state_dict": {}, "frames": 0}
    torch.save({**checkpoint, "ranks": [{"algorithm": algorithm}]}, path)
    return str(path)


def test_it_may_begin_with_the_newest_entries_of_another_runs_checkpoint(tmp_path):
    there = memory(capacity=8, rule=Newest())
    there.insert(new([float(v) for v in range(6)], tasks=[0, 1, 2, 0, 1, 2]))
    there.insert(new([6.0, 7.0, 8.0, 9.0]))
    path = checkpoint(tmp_path / "a.ckpt", {"memory": there.save_state()})
    held = memory(capacity=4, prefill=path)
    assert sorted(values(held)) == [6, 7, 8, 9]
    larger = memory(capacity=12, prefill=path, rule=Newest())
    assert sorted(values(larger)) == [2, 3, 4, 5, 6, 7, 8, 9]
    larger.insert(new([20.0, 21.0, 22.0, 23.0, 24.0]))
    assert sorted(values(larger)) == [3, 4, 5, 6, 7, 8, 9, 20, 21, 22, 23, 24]  # over the oldest of what it began with


def test_a_foreign_memory_is_refused(tmp_path):
    there = memory()
    there.insert(new([1.0]))
    state = {"memory": there.save_state()}
    with pytest.raises(RecipeError, match=r"model.memory.prefill: .* is of a run without a memory"):
        memory(prefill=checkpoint(tmp_path / "without.ckpt", {}))
    with pytest.raises(
        RecipeError, match=r"model.memory.prefill: .* is of a run without a memory, or with an empty one"
    ):
        memory(prefill=checkpoint(tmp_path / "empty.ckpt", {"memory": memory().save_state()}))
    with pytest.raises(RecipeError, match=r"model.memory.prefill: .* remembers .* data.env has"):
        memory(prefill=checkpoint(tmp_path / "other.ckpt", state, Spaces((3,), 4, True, tasks=("a", "b", "c"))))
    with pytest.raises(ValueError, match=r"prefill: there is no file nowhere.ckpt"):
        memory(prefill="nowhere.ckpt")


def test_bad_options_are_named():
    with pytest.raises(RecipeError, match=r"EpisodicMemory.capacity is 0"):
        EpisodicMemory(capacity=0)
    with pytest.raises(RecipeError, match=r"capacity is 2; .* of which there are 3"):
        memory(rule=TaskQuota(), capacity=2)
    with pytest.raises(RecipeError, match=r"of which there are 0"):
        EpisodicMemory(rule=TaskQuota()).begin(Spaces((2,), 4, True), 0, [])
    with pytest.raises(RecipeError, match=r"model.memory.capacity is 5, but the state holds 4"):
        memory().load_state(memory(capacity=4).save_state())


def test_a_memory_of_another_agent_is_refused(tmp_path):
    there = memory()
    there.insert(new([1, 2, 3]))
    path = tmp_path / "other.ckpt"
    checkpoint = {"recipe": {}, "state_dict": {}, "spaces": SPACES.asdict(), "frames": 0}
    torch.save({**checkpoint, "ranks": [{"algorithm": {"memory": there.save_state()}}]}, path)
    here = EpisodicMemory(prefill=str(path))
    with pytest.raises(RecipeError, match="this agent needs context_state, episode_return"):
        here.begin(SPACES, 0, ["observation", "task", "state_value", "context_state"])
