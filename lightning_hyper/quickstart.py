"""The main job, small: RNN and RNN+HN learn GridNavi, next to what chance and the best explorer get."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

RECIPES = ("recurrent/gridnavi_rnn", "recurrent/gridnavi_rnn_hn")
EXPERIMENT = "quickstart"


def quickstart(root: str | Path = "runs", overrides: Sequence[str] = ()) -> int:
    """Train both methods with one seed, print the table, write the pictures; called again, it does what is left.

    Args:
        root: folder under which everything is written.
        overrides: options passed on to `fit`.

    Returns:
        0, or the exit code of the training that failed.
    """
    folders = {}
    for recipe in RECIPES:
        run = recipe.rpartition("/")[2]
        folders[recipe] = folder = Path(root) / EXPERIMENT / run
        if (folder / "finished.json").exists():
            continue
        command = [sys.executable, "-m", "lightning_hyper", "fit", "-c", recipe, "--root", str(root)]
        command += ["--experiment", EXPERIMENT, "--run", run, *overrides]
        if (folder / "checkpoints" / "last.ckpt").exists():
            command += ["--ckpt_path", "last"]
        print(f"\n{recipe}", flush=True)
        code = subprocess.run(command).returncode
        if code:
            return code
    _show(folders, root)
    return 0


def _show(folders: dict[str, Path], root: str | Path) -> None:
    from lightning_hyper.analysis.gridnavi import explorer_returns, random_returns, told_returns
    from lightning_hyper.analysis.report import report
    from lightning_hyper.checkpoint_file import read_checkpoint
    from lightning_hyper.envs import GridNavi

    env = GridNavi(1)
    rows: dict[str, Sequence[float]] = {"random actions": random_returns(env).tolist()}
    for folder in folders.values():
        summary = json.loads((folder / "finished.json").read_text())
        method = read_checkpoint(folder / "checkpoints" / "last.ckpt")["recipe"]["method"]
        rows[method] = [summary[f"eval/episode_{k + 1}"] for k in range(env.episodes)]
    rows["best explorer"] = explorer_returns(env).tolist()
    rows["told the goal"] = told_returns(env).tolist()
    references = {name: sum(rows[name]) for name in ("random actions", "best explorer")}
    made = report(EXPERIMENT, root, references=references)
    print(f"\nGridNavi: mean return in each episode of a trial\n\n{'':16}", end="")
    print("".join(f"episode {k + 1:<3}" for k in range(env.episodes)), "    trial")
    for name, returns in rows.items():
        print(f"{name:16}" + "".join(f"{value:9.2f}  " for value in returns) + f"{sum(returns):10.2f}")
    print(
        "\nThe methods are measured on sampled trials; random and told are exact, the best explorer is found by search."
    )
    print("Pictures:")
    for path in (*sorted(made.folder.glob("*.png")), *(folder / "trial.png" for folder in folders.values())):
        print(f"  {path}")
    print(f"\nBoth runs in MLflow:  {os.path.relpath(sys.executable)} -m lightning_hyper ui --root {root}")


if __name__ == "__main__":
    sys.exit(quickstart(overrides=sys.argv[1:]))
