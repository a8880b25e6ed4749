"""Returns of the episodes or trials that end, as metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from lightning_hyper.modules.normalization import sum_over_ranks


def episode_metrics(
    after: Mapping[str, Tensor] | TensorDictBase,
    prefix: str,
    *,
    task: Tensor | None = None,
    tasks: Sequence[str] = (),
    by_episode: Tensor | None = None,
) -> dict[str, Tensor]:
    """Mean undiscounted return and length of what ends (of all ranks), return by task and by episode of a trial.

    Args:
        after: has `done`, `episode_return` and `step_count`, all of one shape `[*B, 1]`.
        prefix: goes before the names `return`, `episode_length`, `return/<task>` and `episode_1`, `episode_2`, ...
        task: index of the task `[*B]`; what is no index is ignored.
        tasks: names of the tasks that are an index.
        by_episode: return of each episode of the trials that end, `[*B, episodes]`; every row counts.

    Returns:
        nothing where nothing ended on any rank.
    """
    done = after["done"]
    names = metric_names(prefix, tasks if task is not None else (), 0 if by_episode is None else by_episode.shape[-1])
    total, frames = after["episode_return"][done].double(), after["step_count"][done].double()
    sums: list[Tensor] = [total.sum(), frames.sum(), done.sum().double()]
    if tasks and task is not None:
        of = task[done.squeeze(-1)]
        for weight in (total, torch.ones_like(total)):
            sums += list(torch.zeros(len(tasks), dtype=total.dtype, device=total.device).index_add_(0, of, weight))
    if by_episode is not None:
        sums += list(by_episode.flatten(0, -2).double().sum(0))
    ended: Any = sum_over_ranks(torch.stack(sums)).cpu()
    if not ended[2]:
        return {}
    means, rest = [ended[0] / ended[2], ended[1] / ended[2]], ended[3:]
    if tasks and task is not None:
        by_task, counts, rest = rest[: len(tasks)], rest[len(tasks) : 2 * len(tasks)], rest[2 * len(tasks) :]
        means += list(by_task / counts)  # NaN where no episode of a task has ended
    means += list(rest / ended[2])
    return {name: mean for name, mean in zip(names, means, strict=True) if not mean.isnan()}


def metric_names(prefix: str, tasks: Sequence[str] = (), episodes: int = 0) -> list[str]:
    """Names of the metrics that `episode_metrics` can give, with so many episodes of a trial, 0 outside of trials."""
    by_task = [f"{prefix}/return/{name}" for name in tasks]
    return [
        f"{prefix}/return",
        f"{prefix}/episode_length",
        *by_task,
        *(f"{prefix}/episode_{k + 1}" for k in range(episodes)),
    ]
