"""Training runs of an MLflow experiment, as its tags and metrics tell them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_hyper.analysis.figures import short_task

if TYPE_CHECKING:
    from mlflow import MlflowClient

NOT_TRAINING = {"sweep", "report", "validate", "test"}  # values of the tag `kind`

Array = NDArray[np.float64]


@dataclass
class Run:
    """One training run: what its tags say it is, and its curve of the metric over frames."""

    id: str
    name: str
    environment: str
    label: str
    seed: str
    status: str
    ended: int  # milliseconds since 1970, or when it began while it is running
    frames: Array
    values: Array
    parts: dict[str, float]  # last value of each episode of a trial, or of each task
    frames_per_second: float


def training_runs(
    client: MlflowClient, experiment_id: str, metric: str, *, unfinished: bool = False
) -> tuple[list[Run], list[str]]:
    """The runs of an experiment that have a metric, the newest for each environment, method, variant and seed.

    Args:
        client: of the MLflow server.
        experiment_id: the experiment.
        metric: key of the metric.
        unfinished: take runs too that have not finished.

    Returns:
        The runs, and notes on what was left out or looks wrong, each a sentence.
    """
    notes: list[str] = []
    return _chosen(_with_metric(client, experiment_id, metric, notes), unfinished, notes), notes


def _all_runs(client: MlflowClient, experiment_id: str) -> Iterable[Any]:
    token = None
    while True:
        page = client.search_runs([experiment_id], max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _with_metric(client: MlflowClient, experiment_id: str, metric: str, notes: list[str]) -> list[Run]:
    runs, without = [], []
    for run in _all_runs(client, experiment_id):
        tags = run.data.tags
        if tags.get("kind") in NOT_TRAINING:
            continue
        if metric not in run.data.metrics:
            without.append(run.info.run_name)
            continue
        frames, values = _history(client, run.info.run_id, metric)
        _, speeds = _history(client, run.info.run_id, "time/frames_per_second")
        parts = {
            f"episode {match[1]}" if match[1] else short_task(match[2]): value
            for key, value in run.data.metrics.items()
            if (match := re.fullmatch(r"eval/(?:episode_(\d+)|return/(.+))", key))
        }
        method, variant = tags.get("method") or run.info.run_name, tags.get("variant", "")
        runs.append(
            Run(
                id=run.info.run_id,
                name=run.info.run_name,
                environment=tags.get("environment") or "(no environment)",
                label=f"{method} ({variant})" if variant else method,
                seed=tags.get("seed", ""),
                status=run.info.status,
                ended=run.info.end_time or run.info.start_time,
                frames=frames,
                values=values,
                parts=parts,
                frames_per_second=float(np.median(speeds)) if len(speeds) else float("nan"),
            )
        )
    if without:
        notes.append(f"Left out, without {metric}: {', '.join(sorted(without))}.")
    return runs


def _history(client: MlflowClient, run_id: str, key: str) -> tuple[Array, Array]:
    """Return a metric over frames; where a resumed run has logged a frame again, the later value."""
    history = sorted(client.get_metric_history(run_id, key), key=lambda point: (point.step, point.timestamp))
    latest = {point.step: point.value for point in history}
    return np.array(list(latest), dtype=np.float64), np.array(list(latest.values()), dtype=np.float64)


def _chosen(runs: Sequence[Run], unfinished: bool, notes: list[str]) -> list[Run]:
    """Return one run for each environment, method, variant and seed: the newest, finished ones before others."""
    if not unfinished:
        left = [run for run in runs if run.status != "FINISHED"]
        if left:
            listed = ", ".join(sorted(f"{run.name} ({run.status.lower()})" for run in left))
            notes.append(f"Left out, not finished (--unfinished counts them): {listed}.")
        runs = [run for run in runs if run.status == "FINISHED"]
    newest: dict[tuple[str, str, str], Run] = {}
    for run in sorted(runs, key=lambda run: (run.status == "FINISHED", run.ended)):
        newest[run.environment, run.label, run.seed] = run
    dropped = sorted(run.name for run in runs if newest[run.environment, run.label, run.seed] is not run)
    if dropped:
        notes.append(f"Dropped, as a newer run has the same method, variant and seed: {', '.join(dropped)}.")
    counted = [f"{run.name} ({run.status.lower()})" for run in newest.values() if run.status != "FINISHED"]
    if counted:
        notes.append(f"Counted though not finished: {', '.join(sorted(counted))}.")
    broken = [run.name for run in newest.values() if not np.isfinite(run.values).all()]
    if broken:
        notes.append(f"Not a number somewhere: {', '.join(sorted(broken))}.")
    return list(newest.values())
