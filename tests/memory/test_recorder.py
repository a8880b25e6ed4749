"""Completed episodes come out once, worth what was earned to their end, wherever batches are cut."""

import pytest
import torch
from tensordict import TensorDict

from lightning_hyper.memory import EpisodeRecorder

GAMMA = 0.9
LENGTHS = [[4], [25], [1, 9], [60], [7, 3, 8]]


def stream(lengths=LENGTHS, total=40, *, sparse=False):
    """Environments whose episodes have these lengths, in turn; every second one ends by truncation."""
    n, shape = len(lengths), (len(lengths), total)
    batch = {
        "observation": torch.arange(total).expand(shape).unsqueeze(-1).float(),
        "task": torch.arange(n).unsqueeze(1).expand(shape).clone(),
        "state_value": torch.randn(*shape, 1),
        "context_state": torch.randn(*shape, 3),
        "step_count": torch.zeros(*shape, 1, dtype=torch.int64),
        "next_value": torch.randn(*shape, 1),
    }
    flags = {key: torch.zeros(*shape, 1, dtype=torch.bool) for key in ("done", "terminated", "truncated")}
    reward, total_return = torch.randn(*shape, 1), torch.zeros(*shape, 1)
    for row, turns in enumerate(lengths):
        count, turn, earned = 0, 0, 0.0
        for t in range(total):
            batch["step_count"][row, t] = count
            count += 1
            ends = count == turns[turn % len(turns)]
            if sparse and not ends:
                reward[row, t] = 0
            earned = total_return[row, t] = earned + reward[row, t]
            if ends:
                flags["done"][row, t] = flags["truncated" if turn % 2 else "terminated"][row, t] = True
                count, turn, earned = 0, turn + 1, 0.0
    after = {**flags, "reward": reward, "episode_return": total_return}
    return TensorDict({**batch, "next": TensorDict(after, batch_size=shape)}, batch_size=shape)


def by_hand(batch, *, bootstrap=True):
    """(environment, time, value, return, time of the end) of each step of the episodes that end, by plain numbers."""
    after, found = batch["next"], []
    for row in range(batch.shape[0]):
        steps = []
        for t in range(batch.shape[1]):
            steps.append((t, after["reward"][row, t].item()))
            if not after["done"][row, t]:
                continue
            truncated = not after["terminated"][row, t]
            value = batch["next_value"][row, t].item() if truncated and bootstrap else 0.0
            earned, episode = sum(r for _, r in steps), []
            for time, reward in reversed(steps):
                value = reward + GAMMA * value
                episode.append((row, time, value, earned, t))
            found += reversed(episode)
            steps = []
    return found


def recorder(**options):
    return EpisodeRecorder(GAMMA, ["observation", "task", "state_value", "context_state"], **options)


def rows(entries):
    columns = (entries["task"], entries["observation"][:, 0], entries["value"], entries["episode_return"])
    return [tuple(map(float, step)) for step in zip(*columns, strict=True)]


@pytest.mark.parametrize("bootstrap", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("cuts", [[40], [7, 7, 7, 7, 7, 5], [1] * 40, [30, 10]])
def test_completed_episodes_come_out_once_with_what_they_were_worth(cuts, sparse, bootstrap):
    batch = stream(sparse=sparse)
    expected, found, made, t = by_hand(batch, bootstrap=bootstrap), 0, recorder(bootstrap=bootstrap), 0
    for cut in cuts:
        entries = made.completed(batch[:, t : t + cut])
        within = [step[:4] for step in expected if t <= step[4] < t + cut]
        assert len(entries) == len(within)
        for got, want in zip(rows(entries), within, strict=True):
            assert got == pytest.approx(want, rel=1e-4, abs=1e-5)
        found, t = found + len(entries), t + cut
    assert found == len(expected) > 100
    assert batch["next", "truncated"].sum() > 3


def test_what_is_kept_is_that_of_the_step():
    batch, made = stream(), recorder()
    entries = torch.cat([made.completed(batch[:, t : t + 8]) for t in range(0, 40, 8)])
    at = (entries["task"], entries["observation"][:, 0].long())
    for key in ("state_value", "context_state"):
        assert torch.equal(entries[key], batch[key][at])
    assert set(entries.keys()) == {"observation", "task", "state_value", "context_state", "value", "episode_return"}


def test_nothing_is_completed_where_nothing_ends():
    batch = stream([[60], [50]])
    assert len(recorder().completed(batch)) == 0


def test_unfinished_episodes_survive_a_state():
    batch, made, other = stream(), recorder(), recorder()
    other.load_state(other.save_state())  # fresh
    made.completed(batch[:, :15])
    other.load_state(made.save_state())
    expected, found = made.completed(batch[:, 15:]), other.completed(batch[:, 15:])
    assert len(found) > 50
    assert (found == expected).all()


def test_a_saved_state_does_not_change_afterwards():
    batch, made = stream(), recorder()
    made.completed(batch[:, :15])
    state = made.save_state()
    kept = {key: value.clone() for key, value in state["pending"].items()}
    made.completed(batch[:, 15:])
    assert all(torch.equal(kept[key], state["pending"][key]) for key in kept)
