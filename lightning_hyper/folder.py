"""Where runs keep what: the one place that knows the layout of a root folder and of the run folders in it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from lightning_hyper.checks import RecipeError

CHECKPOINTS = "checkpoints"


def replay_beside(checkpoint: Path, frames: int) -> Path:
    """Folder of the replay buffer that goes with a checkpoint of a frame."""
    return checkpoint.parent / f"replay-{frames}"


def file_name(key: str, name: str) -> None:
    """Check that a name can be that of a file or folder, and of nothing outside the one that it is made in.

    Args:
        key: the recipe's key.
        name: what was given.

    Raises:
        RecipeError: it cannot.
    """
    odd = name in ("", ".", "..") or not name.isprintable() or set(name) & set("/\\")
    if odd or len(name.encode()) > 200:
        shown = name if len(name) <= 60 else f"{name[:60]}..."
        raise RecipeError(f"{key} is {shown!r}; it must be a name of 1 to 200 bytes without / and \\, and not . or ..")


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
        """Folder of a run.

        Raises:
            RecipeError: a name that is no name of a folder.
        """
        file_name("experiment", experiment)
        file_name("run", run)
        return RunFolder(self.path / experiment / run)

    def runs(self, experiment: str) -> list[RunFolder]:
        """Folders of the runs of an experiment that are there, by name; RecipeError as in `run`."""
        file_name("experiment", experiment)
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
    def of_checkpoint(cls, checkpoint: Path) -> RunFolder | None:
        """Folder of the run that a checkpoint lies in; None of one that was copied elsewhere."""
        beside = checkpoint.resolve().parent
        return cls(beside.parent) if beside.name == CHECKPOINTS else None

    @property
    def root(self) -> Path:
        """The root folder that this one lies in."""
        return self.path.parent.parent

    @property
    def experiment(self) -> str:
        """Name of the run's experiment."""
        return self.path.parent.name

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, and of the replay buffers that go with them."""
        return self.path / CHECKPOINTS

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
        return replay_beside(self.last, frames)

    def replays(self) -> list[Path]:
        """Folders of all replay buffers that are there."""
        return sorted(self.checkpoints.glob("replay-*"))

    @property
    def log(self) -> Path:
        """All that a run says which a sweep started, earlier attempts included."""
        return self.path / "log.txt"

    @property
    def metrics(self) -> Path:
        """All metrics, a JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def sent(self) -> Path:
        """How many bytes of `metrics` MLflow has."""
        return self.path / "metrics.sent"

    @property
    def has_checkpoints(self) -> bool:
        """Whether there is one to go on from."""
        return any(self.checkpoints.glob("*.ckpt"))

    def claim(self) -> BaseFileLock:
        """Take the folder for this process, until it ends in whatever way.

        Raises:
            RecipeError: another process writes there.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._lock)
        try:
            lock.acquire(timeout=1)
        except Timeout:
            raise RecipeError(
                f"run: {self.path} is being written by another process; end that one, or choose another --run"
            ) from None
        except NotImplementedError:  # a file system without locks
            pass
        return lock

    def unclaim(self, lock: BaseFileLock) -> None:
        """Give back a folder in which nothing was done."""
        lock.release()
        self._lock.unlink(missing_ok=True)
        with suppress(OSError):  # something else lies there
            for folder in (self.path, self.path.parent, self.root):
                folder.rmdir()

    def abandoned(self) -> bool:
        """Whether a run has been here and no process writes any more; False where that cannot be told."""
        lock = FileLock(self._lock)
        try:
            if not self._lock.is_file():
                return False
            lock.acquire(timeout=0)
        except (Timeout, NotImplementedError, OSError):
            return False
        lock.release()
        return True

    @property
    def _lock(self) -> Path:
        return self.path / ".lock"

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
