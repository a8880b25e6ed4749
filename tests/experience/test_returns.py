"""Returns of what ends, as metrics, against plain means."""

import pytest
import torch

from lightning_hyper.experience.returns import episode_metrics

AFTER = {
    "done": torch.tensor([[0, 1, 0, 1], [0, 0, 1, 0]]).bool().unsqueeze(-1),
    "episode_return": torch.tensor([[1.0, 2.0, 5.0, 9.0], [3.0, 4.0, 7.0, 8.0]]).unsqueeze(-1),
    "step_count": torch.tensor([[1, 2, 1, 2], [5, 6, 7, 1]]).unsqueeze(-1),
}


def plain(metrics):
    return {key: value.item() for key, value in metrics.items()}


def test_return_and_length_are_means_over_what_ends():
    assert plain(episode_metrics(AFTER, "x")) == pytest.approx({"x/return": 6, "x/episode_length": 11 / 3})


def test_returns_by_task_are_means_over_that_tasks_episodes_alone():
    task = torch.tensor([[2, 2, 0, 0], [2, 2, 2, 1]])
    metrics = plain(episode_metrics(AFTER, "x", task=task, tasks=("a", "b", "c")))
    assert metrics == pytest.approx(
        {"x/return": 6, "x/episode_length": 11 / 3, "x/return/a": 9, "x/return/c": (2 + 7) / 2}
    )


def test_a_task_that_is_a_vector_is_ignored():
    assert plain(episode_metrics(AFTER, "x", task=torch.randn(2, 4, 3))) == plain(episode_metrics(AFTER, "x"))


def test_returns_of_each_episode_are_means_over_trials():
    ends = {key: entry[:, -1] for key, entry in AFTER.items()} | {"done": torch.ones(2, 1, dtype=torch.bool)}
    metrics = plain(episode_metrics(ends, "x", by_episode=torch.tensor([[1.0, 2.0, 6.0], [3.0, 0.0, 5.0]])))
    expected = {"x/return": 8.5, "x/episode_length": 1.5, "x/episode_1": 2, "x/episode_2": 1, "x/episode_3": 5.5}
    assert metrics == pytest.approx(expected)


def test_all_together():
    ends = {key: entry[:, -1] for key, entry in AFTER.items()} | {"done": torch.ones(2, 1, dtype=torch.bool)}
    options = {"task": torch.tensor([1, 1]), "tasks": ("a", "b"), "by_episode": torch.tensor([[4.0], [6.0]])}
    metrics = plain(episode_metrics(ends, "x", **options))
    assert metrics == pytest.approx({"x/return": 8.5, "x/episode_length": 1.5, "x/return/b": 8.5, "x/episode_1": 5})


def test_nothing_is_said_where_nothing_ends():
    after = AFTER | {"done": torch.zeros_like(AFTER["done"])}
    assert episode_metrics(after, "x", task=torch.zeros(2, 4, dtype=torch.int64), tasks=("a",)) == {}


def test_many_small_returns_lose_nothing():
    after = {
        "done": torch.ones(100_000, 1, dtype=torch.bool),
        "episode_return": torch.full((100_000, 1), 0.1),
        "step_count": torch.ones(100_000, 1, dtype=torch.int64),
    }
    assert episode_metrics(after, "x")["x/return"].item() == pytest.approx(torch.tensor(0.1).item(), rel=1e-9)
