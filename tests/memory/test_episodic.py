"""What enters an episodic memory, what leaves it, and that a state keeps all of it."""

from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from lightning_hyper.memory import EpisodicMemory

MISSIONS = [["open"], ["go", "run"], ["fetch"]]


def new(values, tasks=None, returns=None, critic=0.0):
    values = torch.tensor(values, dtype=torch.float32)
    n = len(values)
    tasks = torch.zeros(n, dtype=torch.int64) if tasks is None else torch.tensor(tasks)
    return TensorDict(
        {
            "observation": torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 2, 2, 3),
            "value": values,
            "state_value": torch.full((n, 1), critic),
            "task": tasks,
            "mission": tasks,
            "episode_return": values if returns is None else torch.tensor(returns),
        },
        batch_size=[n],
    )


def memory(seed=0, **options):
    made = EpisodicMemory(**{"capacity": 5, "recentre": False, **options})
    made.begin((2, 2, 3), MISSIONS, seed)
    return made


def values(held):
    return held.entries["value"][held.draw()].tolist()


def test_it_begins_empty():
    held = memory()
    assert len(held) == 0
    assert len(held.draw()) == len(held.draw(3)) == 0


def test_uniform_draws_with_replacement_and_overwrites_the_oldest():
    held = memory()
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
    held = memory(rule="newest")
    held.insert(new([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]))
    assert sorted(values(held)) == [3, 4, 5, 6, 7]
    held.insert(new([8.0, 9.0]))
    assert sorted(values(held)) == [5, 6, 7, 8, 9]


def test_best_return_keeps_the_entries_of_the_best_episodes():
    held = memory(rule="best_return")
    held.insert(new([1.0, 2.0, 3.0], returns=[0.5, 0.9, 0.1]))
    held.insert(new([4.0, 5.0, 6.0, 7.0], returns=[0.8, 0.0, 0.7, 0.6]))
    assert sorted(values(held)) == [1, 2, 4, 6, 7]
    held.insert(new([8.0], returns=[0.05]))
    assert sorted(values(held)) == [1, 2, 4, 6, 7]


def test_task_quota_leaves_every_task_its_share():
    held = memory(rule="task_quota", capacity=6)
    held.insert(new([1.0] * 50, tasks=[0] * 50))
    held.insert(new([2.0], tasks=[1]))
    held.insert(new([3.0] * 9, tasks=[2] * 9))
    held.insert(new([4.0] * 50, tasks=[0] * 50))
    assert sorted(values(held)) == [2, 3, 3, 4, 4]


def test_values_are_recentred_to_the_critics_mean():
    held = memory(recentre=True, rule="newest")
    held.insert(new([1.0, 2.0, 6.0], critic=10.0))
    assert sorted(values(held)) == pytest.approx([8, 9, 13])


def test_a_subset_is_drawn_without_replacement_and_evenly():
    held = memory(rule="newest")
    held.insert(new([1.0, 2.0, 3.0, 4.0, 5.0]))
    counts = torch.zeros(5)
    for _ in range(1000):
        places = held.draw(2)
        assert len(set(places.tolist())) == 2
        counts[places] += 1
    assert (counts - 400).abs().max() < 80  # 5 standard deviations are 77


@pytest.mark.parametrize("rule", ["uniform", "newest", "best_return", "task_quota"])
def test_a_restored_memory_goes_on_exactly(rule):
    held, other = memory(rule=rule), memory(seed=9, rule=rule)
    held.insert(new([1.0, 5.0, 3.0, 2.0, 8.0, 7.0], tasks=[0, 1, 2, 0, 1, 2]))
    held.draw(2)
    other.load_state_dict(held.state_dict())
    for batch in (new([4.0, 9.0], tasks=[1, 0]), new([6.0, 0.0, 2.5], tasks=[2, 2, 1])):
        held.insert(batch)
        other.insert(batch)
        assert torch.equal(held.draw(3), other.draw(3))
        assert values(held) == values(other)
        assert torch.equal(held.entries["observation"], other.entries["observation"])
        assert torch.equal(held.stamps, other.stamps)


def test_the_global_generator_is_left_alone():
    held = memory()
    before = torch.get_rng_state()
    held.insert(new([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    held.draw(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_may_begin_with_the_newest_entries_of_another_runs_checkpoint(tiny):
    assert tiny("fit", "--run", "a", recipe=Path(__file__).parents[1] / "tiny_retrieval.yaml") == 0
    path = "runs/tiny/a/checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    there, spaces = checkpoint["ranks"][0]["algorithm"]["memory"], checkpoint["spaces"]
    held = EpisodicMemory(capacity=4, prefill=path)
    held.begin(spaces["image"], spaces["missions"], 0)
    newest = there["stamps"].argsort()[-4:]
    assert there["stamps"][newest[0]] > 0
    assert values(held) == there["entries"]["value"][newest].tolist()
    assert torch.equal(held.entries["observation"], there["entries"]["observation"][newest])
    with pytest.raises(ValueError, match=r"remembers observations \(7, 7, 3\) of the tasks MiniGrid-Empty-5x5-v0, "):
        memory(prefill=path)
    assert tiny("fit", "--run", "without", "--frames", "320") == 0
    with pytest.raises(ValueError, match=r"is of a run without a memory"):
        memory(prefill="runs/tiny/without/checkpoints/last.ckpt")


def test_bad_options_are_named():
    with pytest.raises(ValueError, match=r"memory.capacity is 0"):
        EpisodicMemory(capacity=0)
    with pytest.raises(ValueError, match=r"memory.rule is 'oldest'; choose one of uniform"):
        EpisodicMemory(rule="oldest")
    with pytest.raises(ValueError, match=r"capacity is 2; .* each of 3 tasks"):
        memory(rule="task_quota", capacity=2)
    with pytest.raises(ValueError, match=r"prefill: there is no file nowhere.ckpt"):
        memory(prefill="nowhere.ckpt")
