"""The main job, small: RNN and RNN+HN learn GridNavi, next to what chance and the best policy get."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_hyper.folder import Root, RunFolder
from lightning_hyper.recipes import stem
from lightning_hyper.sweep import sweep

RECIPES = ("recurrent/gridnavi_rnn", "recurrent/gridnavi_rnn_hn")
EXPERIMENT = "quickstart"


def quickstart(root: str | Path = "runs", overrides: Sequence[str] = ()) -> int:
    """Train both methods with one seed, print the table, write the pictures; called again, it does what is left.

    Args:
        root: folder under which everything is written.
        overrides: options passed on to `fit`.

    Returns:
        0, or the exit code of the sweep of which a run failed.
    """
    code = sweep(RECIPES, [0], jobs=1, experiment=EXPERIMENT, root=root, overrides=overrides)
    if code == 0:
        _show([Root(Path(root)).run(EXPERIMENT, f"{stem([recipe])}-seed0") for recipe in RECIPES], root)
    return code


def _show(folders: Sequence[RunFolder], root: str | Path) -> None:
    from lightning_hyper.analysis.gridnavi import optimal_returns, random_returns, told_returns
    from lightning_hyper.analysis.report import report
    from lightning_hyper.checkpoint_file import read_checkpoint
    from lightning_hyper.envs import GridNavi, Trials

    env = Trials(GridNavi, episodes=4)
    rows: dict[str, Sequence[float]] = {"random actions": random_returns(env).tolist()}
    for folder in folders:
        summary = folder.summary() or {}
        method = read_checkpoint(folder.last)["recipe"]["method"]
        rows[method] = [summary[f"eval/episode_{k + 1}"] for k in range(env.episodes)]
    rows["best policy"] = optimal_returns(env).tolist()
    rows["told the goal"] = told_returns(env).tolist()
    references = {name: sum(rows[name]) for name in ("random actions", "best policy")}
    made = report(EXPERIMENT, root, references=references)
    print(f"\nGridNavi: mean return in each episode of a trial\n\n{'':16}", end="")
    print("".join(f"episode {k + 1:<3}" for k in range(env.episodes)), "    trial")
    for name, returns in rows.items():
        print(f"{name:16}" + "".join(f"{value:9.2f}  " for value in returns) + f"{sum(returns):10.2f}")
    print("\nThe methods are measured by most likely actions, the others computed exactly.\nPictures:")
    for path in (*sorted(made.folder.glob("*.png")), *(folder.path / "trial.png" for folder in folders)):
        print(f"  {path}")
    print(f"\nBoth runs in MLflow:  {os.path.relpath(sys.executable)} -m lightning_hyper ui --root {root}")


if __name__ == "__main__":
    sys.exit(quickstart(overrides=sys.argv[1:]))
