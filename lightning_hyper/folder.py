"""Where runs keep what: the one place that knows the layout of a root folder and of the run folders in it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Root:
    """The folder under which everything lies that runs write: MLflow's database and files, a folder per experiment.

    Args:
        path: the folder; need not exist.
    """

    path: Path

    @property
    def database(self) -> Path:
        """MLflow's SQLite database."""
        return self.path / "mlflow.db"

    @property
    def artifacts(self) -> Path:
        """Folder of the files that MLflow keeps."""
        return self.path / "artifacts"

    @property
    def lock(self) -> Path:
        """File that a process locks while it makes the database or an experiment in it."""
        return self.path / ".mlflow.lock"

    def run(self, experiment: str, run: str) -> RunFolder:
        """Folder of a run."""
        return RunFolder(self.path / experiment / run)

    def runs(self, experiment: str) -> list[RunFolder]:
        """Folders of the runs of an experiment that are there, by name."""
        folder = self.path / experiment
        return [RunFolder(path) for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []

    def unused(self, experiment: str, stem: str) -> RunFolder:
        """Folder of a run that is not there yet: `<stem>`, or else `<stem>-2`, `<stem>-3`, ..."""
        names = itertools.chain([stem], (f"{stem}-{k}" for k in itertools.count(2)))
        return next(folder for folder in (self.run(experiment, name) for name in names) if not folder.path.exists())

    def newest(self, experiment: str, run: str, checkpoint: str) -> Path | None:
        """Newest checkpoint of a name among the runs called `run` or `run-<number>`; None where there is none."""
        called = re.compile(re.escape(run) + r"(-\d+)?")
        files = [each.checkpoint(checkpoint) for each in self.runs(experiment) if called.fullmatch(each.name)]
        return max((file for file in files if file.is_file()), key=lambda file: file.stat().st_mtime, default=None)


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    Args:
        path: the folder; need not exist.
    """

    path: Path

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> RunFolder:
        """Folder of the run that wrote a checkpoint."""
        return cls(checkpoint.resolve().parents[1])

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, and of the replay buffers that go with them."""
        return self.path / "checkpoints"

    def checkpoint(self, name: str) -> Path:
        """A checkpoint by its name, such as `last` or `best`."""
        return self.checkpoints / f"{name}.ckpt"

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.checkpoint("last")

    @property
    def best(self) -> Path:
        """The checkpoint with the best evaluation so far."""
        return self.checkpoint("best")

    def kept(self, frames: int) -> Path:
        """The checkpoint of a frame that is kept for good."""
        return self.checkpoint(f"frames={frames}")

    def replay(self, frames: int) -> Path:
        """Folder of the replay buffer that goes with the checkpoints of a frame."""
        return self.checkpoints / f"replay-{frames}"

    def replays(self) -> list[Path]:
        """Folders of all replay buffers that are there."""
        return sorted(self.checkpoints.glob("replay-*"))

    @property
    def log(self) -> Path:
        """All that a run says which a sweep started, earlier attempts included."""
        return self.path / "log.txt"

    @property
    def unsent(self) -> Path:
        """Metrics that MLflow did not take, a JSON object a line."""
        return self.path / "unsent_metrics.jsonl"

    @property
    def finished(self) -> Path:
        """What a run that was trained to its end leaves behind: frames, budget and last evaluation, in JSON."""
        return self.path / "finished.json"

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Say that the run is trained to its end."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.finished.write_text(json.dumps(dict(summary)), encoding="utf-8")

    def summary(self) -> dict[str, Any] | None:
        """What `finish` wrote; None where the run is not finished, or the file was cut while it was written."""
        try:
            summary = json.loads(self.finished.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return summary if isinstance(summary, dict) else None
