import pytest
import torch
from tensordict import TensorDict

from lightning_hyper.checkpoint_file import EntryError
from lightning_hyper.memory import TrialStore


def batches(lengths, steps, *, envs=2):
    """Batches `[envs, steps]` of trials of these lengths, one after the other; the observation counts all steps shown.

    Gives the batches and, for each trial, what it shows from its first step to its last observation.
    """
    frames, trials = [[] for _ in range(envs)], []
    for env in range(envs):
        shown = 1_000 * env
        for length in lengths[env:] + lengths[:env]:
            trials.append((env, list(range(shown, shown + length + 1))))
            frames[env] += [(shown + k, k, k == length - 1) for k in range(length)]
            shown += length + 1
    total = min(len(each) for each in frames) // steps * steps
    rows = torch.tensor([each[:total] for each in frames])
    for start in range(0, total, steps):
        shown, count, done = rows[:, start : start + steps].unbind(-1)
        after = {"observation": (shown + 1).unsqueeze(-1).float(), "done": done.bool().unsqueeze(-1)}
        now = {"observation": shown.unsqueeze(-1).float(), "step_count": count.unsqueeze(-1)}
        yield TensorDict({**now, "next": TensorDict(after, [envs, steps])}, [envs, steps]), trials


def kept(store):
    trials, lengths = store.sample(len(store))
    return {tuple(row[:n, 0].int().tolist()) for row, n in zip(trials["observation"], lengths, strict=True)}


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_trials_are_kept_whole_wherever_batches_cut_them(steps):
    store = TrialStore(100, ["observation"])
    for batch, _ in (made := list(batches([3, 5, 1, 3, 8], steps))):
        store.add(batch)
    assert kept(store) == {tuple(shown) for _, shown in made[0][1]}


def test_the_newest_are_kept():
    store = TrialStore(3, ["observation"])
    made = list(batches([2, 2, 2, 2], 2, envs=1))
    for batch, _ in made:
        store.add(batch)
    assert kept(store) == {tuple(shown) for _, shown in made[0][1][-3:]}


def test_a_sample_has_no_trial_twice_and_no_more_than_there_are():
    store = TrialStore(100, ["observation"])
    for batch, _ in batches([3, 3, 3, 3], 12):
        store.add(batch)
    trials, lengths = store.sample(5)
    assert trials["observation"].shape == (5, 4, 1)
    assert len({int(row[0]) for row in trials["observation"]}) == 5
    assert lengths.tolist() == [4] * 5
    assert len(store.sample(99)[1]) == 8


@pytest.mark.parametrize("after", [0, 1, 3])
def test_it_continues_exactly(after):
    whole, parts = TrialStore(4, ["observation"]), TrialStore(4, ["observation"])
    for k, (batch, _) in enumerate(batches([3, 5, 1, 3, 4], 4)):
        whole.add(batch)
        parts.add(batch)
        if k == after:
            state = parts.save_state()
            parts = TrialStore(4, ["observation"])
            parts.load_state(state)
    assert kept(whole) == kept(parts)
    assert torch.equal(whole.lengths, parts.lengths)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"lengths": torch.zeros(5, dtype=torch.int64)}, "lengths"),
        ({"lengths": torch.zeros(2)}, "lengths"),
        ({"kept": {"reward": torch.zeros(2, 4, 1)}}, "has reward, not observation"),
        ({"kept": {"observation": torch.zeros(1, 4, 1)}}, "1, 4, 1"),
        ({"kept": {"observation": torch.zeros(2, 2, 1)}}, "fewer than lengths"),
    ],
)
def test_another_stores_state_is_refused(change, fault):
    state = {"lengths": torch.tensor([4, 4]), "kept": {"observation": torch.zeros(2, 4, 1)}, "open": {}, "next": 2}
    TrialStore(4, ["observation"]).load_state(state)
    with pytest.raises(EntryError, match=fault):
        TrialStore(4, ["observation"]).load_state({**state, **change})
