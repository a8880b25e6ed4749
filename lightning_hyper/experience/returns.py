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
    means = {f"{prefix}/return": ended[0] / ended[2], f"{prefix}/episode_length": ended[1] / ended[2]}
    rest = ended[3:]
    if tasks and task is not None:
        by_task, counts, rest = rest[: len(tasks)], rest[len(tasks) : 2 * len(tasks)], rest[2 * len(tasks) :]
        means |= {f"{prefix}/return/{name}": by_task[k] / counts[k] for k, name in enumerate(tasks) if counts[k]}
    means |= {f"{prefix}/episode_{k + 1}": value / ended[2] for k, value in enumerate(rest)}
    return means
