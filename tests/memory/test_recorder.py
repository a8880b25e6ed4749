"""Only completed episodes come out, with their discounted last reward, wherever batches are cut."""

import pytest
import torch
from tensordict import TensorDict

from lightning_hyper.memory import EpisodeRecorder


def stream(lengths, total, gamma=0.9):
    """Environments whose episodes have these lengths, in turn: a batch `[num_envs, total]`, and what completes."""
    n = len(lengths)
    shape = (n, total)
    batch = {
        "observation": torch.zeros(*shape, 2, 2, 3, dtype=torch.uint8),
        "task": torch.arange(n).unsqueeze(1).expand(shape).clone(),
        "mission": torch.arange(n).unsqueeze(1).expand(shape).clone() + 10,
        "state_value": torch.randn(*shape, 1),
        "step_count": torch.zeros(*shape, 1, dtype=torch.int64),
    }
    done, reward = torch.zeros(*shape, 1, dtype=torch.bool), torch.randn(*shape, 1)
    for row, turns in enumerate(lengths):
        count, turn = 0, 0
        for t in range(total):
            batch["observation"][row, t] = t % 251
            batch["step_count"][row, t] = count
            count += 1
            if count == turns[turn % len(turns)]:
                done[row, t], count, turn = True, 0, turn + 1
    nested = TensorDict({**batch, "next": {"done": done, "reward": reward}}, batch_size=[n])
    expected = []
    for row in range(n):
        ends = done[row, :, 0].nonzero().flatten().tolist()
        for t in range(total):
            end = next((e for e in ends if e >= t), None)
            if end is not None:
                last = reward[row, end, 0].item()
                expected.append((row, t % 251, gamma ** (end - t) * last, last, end))
    return nested, expected


def rows(entries):
    observed = entries["observation"][:, 0, 0, 0]
    pairs = zip(entries["task"], observed, entries["value"], entries["episode_return"], strict=True)
    return [(int(task), int(o), float(value), float(last)) for task, o, value, last in pairs]


@pytest.mark.parametrize("cuts", [[40], [7, 7, 7, 7, 7, 5], [1] * 40, [30, 10]])
def test_completed_episodes_come_out_once_whatever_the_batches(cuts):
    batch, expected = stream([[4], [25], [1, 9], [60], [7, 3, 8]], 40)
    recorder = EpisodeRecorder(60, 0.9)
    found, t = [], 0
    for cut in cuts:
        part = batch.clone()
        part = TensorDict(
            {key: batch[key][:, t : t + cut] for key in batch.keys() if key != "next"}  # noqa: SIM118
            | {"next": {key: batch["next", key][:, t : t + cut] for key in ("done", "reward")}},
            batch_size=batch.batch_size,
        )
        entries = recorder.completed(part)
        within = [(row, o, value, last) for row, o, value, last, end in expected if t <= end < t + cut]
        assert len(entries) == len(within)
        for got, want in zip(rows(entries), within, strict=True):
            assert got == pytest.approx(want, rel=1e-5)
        found += rows(entries)
        t += cut
    assert len(found) == len(expected) > 100


def test_unfinished_episodes_survive_a_state():
    batch, _ = stream([[4], [25], [1, 9]], 40)

    def window(begin, end):
        return TensorDict(
            {key: batch[key][:, begin:end] for key in batch.keys() if key != "next"}  # noqa: SIM118
            | {"next": {key: batch["next", key][:, begin:end] for key in ("done", "reward")}},
            batch_size=batch.batch_size,
        )

    recorder, other = EpisodeRecorder(60, 0.9), EpisodeRecorder(60, 0.9)
    recorder.completed(window(0, 15))
    other.load_state_dict(recorder.state_dict())
    recorder_next, other_next = recorder.completed(window(15, 40)), other.completed(window(15, 40))
    assert len(other_next)
    assert rows(other_next) == rows(recorder_next)
