"""Recipes times seeds as runs of their own: a few at a time, skipped when finished, resumed when cut."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from lightning_hyper.recipes import resolve
from lightning_hyper.sweep.launch import CHILD, Launcher, LocalProcesses
from lightning_hyper.sweep.parents import Parents
from lightning_hyper.sweep.plan import SweepError, plan
from lightning_hyper.sweep.watch import Watch

__all__ = ["CHILD", "Launcher", "LocalProcesses", "SweepError", "sweep"]


def sweep(
    recipes: Sequence[str],
    seeds: Sequence[int],
    jobs: int = 2,
    experiment: str | None = None,
    root: str | Path = "runs",
    vary: Mapping[str, Sequence[str]] | None = None,
    overrides: Sequence[str] = (),
    *,
    tracking_uri: str | None = None,
    launcher: Launcher | None = None,
    patience: float = 60.0,
    output: IO[str] | None = None,
) -> int:
    """Train each recipe with each seed, `jobs` at a time; called again, it does what is left.

    Runs that are finished for their budget of frames are skipped, and those with a checkpoint are resumed.

    Args:
        recipes: names or paths; `a+b` is one recipe of two layers.
        seeds: of the runs of each recipe.
        jobs: runs at a time.
        experiment: of MLflow; the first recipe's by default.
        root: folder of everything that is written.
        vary: values of recipe keys, as text, of which all combinations are run.
        overrides: options that are passed on to each `fit`.
        tracking_uri: MLflow server; the database under the root by default.
        launcher: where runs are executed; processes of this machine by default.
        patience: seconds that the runs have after Ctrl-C to write a checkpoint.
        output: where progress is told; standard output by default.

    Returns:
        0, 1 if a run failed, 130 after Ctrl-C.

    Raises:
        SweepError, RecipeError: before anything starts.
    """
    if jobs < 1:
        raise SweepError(f"--jobs must be at least 1, not {jobs}")
    resolved = {recipe: resolve([recipe]) for recipe in recipes}
    experiment = experiment or str(resolved[recipes[0]].get("experiment", "default"))
    root = Path(root).absolute()
    planned = plan(resolved, seeds, experiment, root, vary or {}, overrides)
    parents = Parents(tracking_uri, experiment, root, resolved)
    for job in planned:
        job.arguments += ["--parent", parents.ids[job.recipe]]
        if tracking_uri is not None:
            job.arguments += ["--tracking_uri", tracking_uri]
    try:
        return Watch(planned, jobs, launcher or LocalProcesses(), patience, output or sys.stdout).run()
    finally:
        parents.close(planned)
