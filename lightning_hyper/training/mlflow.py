"""Runs in MLflow: metrics over frames, sent by a thread of their own; one run from first start to last resume."""

from __future__ import annotations

import json
import logging
import os
import platform
import queue
import sqlite3
import subprocess
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from lightning_hyper.algorithms import FrameClock

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOCK_SECONDS = 10.0  # how long a database may be locked by somebody else before that is an error
RETRY_SECONDS = (0.5, 2.0, 5.0)


class TrackingError(RuntimeError):
    """Runs cannot be recorded: the message names `root` or `tracking_uri` and says why."""


def database(root: str | Path) -> str:
    """Tracking URI of the database under a root folder."""
    return f"sqlite:///{(Path(root) / 'mlflow.db').resolve()}"


class MLflowLogger(Logger):
    """Logs one run to MLflow, with frames as the x axis.

    Everything is sent by one background thread, which also imports MLflow and opens the run, so that training begins
    at once and is never held up. What cannot be sent is tried again; what is unsent at the end is written to
    `unsent_metrics.jsonl` in the run's folder.

    Args:
        root: folder under which everything lies: `mlflow.db`, `artifacts/`, `<experiment>/<run>/`.
        experiment: name of the MLflow experiment.
        run: name of the run.
        tracking_uri: MLflow server; the database under `root` by default.
        tags: tags of the run.
        parent: MLflow id of the run that this one belongs to.
        run_id: MLflow id of a run to continue.

    Attributes:
        clock: where the x axis comes from; without one, from the step that is given.

    Raises:
        TrackingError: by `open` or the first call after, if the database or server cannot be used.
    """

    def __init__(
        self,
        root: str | Path = "runs",
        experiment: str = "default",
        run: str = "run",
        *,
        tracking_uri: str | None = None,
        tags: Mapping[str, str] | None = None,
        parent: str | None = None,
        run_id: str | None = None,
    ) -> None:
        super().__init__()
        self.root, self.experiment_name, self.run_name = Path(root).resolve(), experiment, run
        self.tracking_uri = tracking_uri or database(root)
        self.tags = {**(tags or {}), **({"mlflow.parentRunId": parent} if parent else {})}
        self.clock: FrameClock | None = None
        self._run_id = run_id
        self._jobs: queue.Queue[Callable[[], None]] = queue.Queue()
        self._fault: TrackingError | None = None
        self._unsent: list[dict[str, Any]] = []
        self._status: str | None = None
        self._thread: threading.Thread | None = None
        self._client: MlflowClient

    # What Lightning asks of a logger.

    @property
    def name(self) -> str:
        return self.experiment_name

    @property
    def save_dir(self) -> str:
        return str(self.root)

    @property
    def version(self) -> str | None:
        """MLflow id of the run; waits until the run is open. None on ranks other than zero."""
        if rank_zero_only.rank == 0 and self._run_id is None:
            self.flush()
        return self._run_id

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        x = self.clock.frames if self.clock is not None else step or 0
        rows = {key: float(value) for key, value in metrics.items() if key != "epoch"}
        if rows:
            entry = {"metrics": rows, "step": x, "timestamp": int(time.time() * 1000)}
            self._enqueue(lambda: self._send(entry))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        flat = {key: str(value)[:500] for key, value in flatten(vars(params) if isinstance(params, Namespace) else params)}
        self._enqueue(lambda: self._record_parameters(flat))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run: `success` makes it FINISHED, anything else FAILED."""
        self.finish("FINISHED" if status == "success" else "FAILED")

    # What the package asks of it beyond that.

    @rank_zero_only
    def open(self) -> None:
        """Begin, or continue, the run. A database that cannot be used is an error at once; a server, a little later."""
        if self._thread is None:
            if self.tracking_uri.startswith("sqlite:///"):
                _check_database(self.root, Path(self.tracking_uri.removeprefix("sqlite:///")))
            self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
            self._jobs.put(self._begin)
            self._thread.start()

    @rank_zero_only
    def finish(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED; of several calls the first that is not FINISHED counts."""
        if self._thread is None or (self._status not in (None, "FINISHED")):
            return
        self._status = status
        self._enqueue(lambda: self._client.set_terminated(self._run_id, status))
        self.flush()
        if self._unsent:
            path = self.root / self.experiment_name / self.run_name / "unsent_metrics.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in self._unsent)
            rank_zero_warn(f"{len(self._unsent)} rows of metrics could not be sent to MLflow; they are in {path}")
            self._unsent.clear()

    @rank_zero_only
    def log_text(self, text: str, artifact: str) -> None:
        """Keep a text as an artifact."""
        self._enqueue(lambda: self._client.log_text(self._run_id, text, artifact))

    @rank_zero_only
    def log_figure(self, figure: Any, artifact: str) -> None:
        """Keep a matplotlib figure as an artifact, `.png` by name."""
        self._enqueue(lambda: self._client.log_figure(self._run_id, figure, artifact))

    @rank_zero_only
    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a file as an artifact."""
        self._enqueue(lambda: self._client.log_artifact(self._run_id, str(path), folder))

    def flush(self) -> None:
        """Wait until everything so far is sent."""
        self.open()
        self._jobs.join()
        if self._fault is not None:
            raise self._fault

    # The thread's side.

    def _enqueue(self, job: Callable[[], None]) -> None:
        self.open()
        if self._fault is not None:
            raise self._fault
        self._jobs.put(job)

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                if self._fault is None:
                    job()
            except Exception as error:  # whatever MLflow raises must not end the thread
                rank_zero_warn(f"MLflow at {self.tracking_uri}: {_first_line(error)}")
            finally:
                self._jobs.task_done()

    def _begin(self) -> None:
        try:
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
            from mlflow import MlflowClient

            for noisy in ("mlflow.store.db.utils", "alembic"):
                logging.getLogger(noisy).setLevel(logging.WARNING)
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / ".mlflow.lock", timeout=60):  # two processes making one database break it
                self._client = MlflowClient(self.tracking_uri)
                experiment = self._experiment()
            if self._run_id is None:
                run = self._client.create_run(experiment, run_name=self.run_name, tags=dict(self.tags))
                self._run_id = run.info.run_id
            else:
                self._client.update_run(self._run_id, status="RUNNING")
                for key, value in self.tags.items():
                    self._client.set_tag(self._run_id, key, value)
        except Exception as error:
            key = "root" if self.tracking_uri == database(self.root) else "tracking_uri"
            self._fault = TrackingError(f"{key}: MLflow at {self.tracking_uri} cannot be used: {_first_line(error)}")

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(self.experiment_name)
        if found is None:
            local = self.tracking_uri.startswith("sqlite:")
            place = (self.root / "artifacts" / self.experiment_name).as_uri() if local else None
            made: str = self._client.create_experiment(self.experiment_name, artifact_location=place)
            return made
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        there: str = found.experiment_id
        return there

    def _send(self, entry: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        at, step = entry["timestamp"], entry["step"]
        rows = [Metric(key, value, at, step) for key, value in entry["metrics"].items()]
        for pause in (*RETRY_SECONDS, None):
            try:
                self._client.log_batch(self._run_id, metrics=rows)
                return
            except Exception as error:
                if pause is None or self._unsent:  # once one row failed for good, the others are not waited for
                    if not self._unsent:
                        rank_zero_warn(f"MLflow at {self.tracking_uri}: {_first_line(error)}; training goes on")
                    self._unsent.append(entry)
                    return
                time.sleep(pause)

    def _record_parameters(self, flat: dict[str, str]) -> None:
        from mlflow.entities import Param

        there = self._client.get_run(self._run_id).data.params
        for key, value in flat.items():
            if there.get(key, value) != value:
                self._client.set_tag(self._run_id, f"changed:{key}", value)
        new = [Param(key, value) for key, value in flat.items() if key not in there]
        for start in range(0, len(new), 100):
            self._client.log_batch(self._run_id, params=new[start : start + 100])


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested mappings with their dotted names."""
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        rows += flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else [(f"{prefix}{key}", value)]
    return rows


def _check_database(root: Path, path: Path) -> None:
    """Find out in milliseconds what MLflow would take minutes to say."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with sqlite3.connect(path, timeout=LOCK_SECONDS) as connection:
            connection.execute("BEGIN IMMEDIATE")
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            connection.rollback()
        connection.close()
    except (OSError, sqlite3.Error) as error:
        raise TrackingError(
            f"root: the MLflow database {path} cannot be written ({error}); choose another --root, or end what locks it"
        ) from error
    if tables and "experiments" not in tables:
        raise TrackingError(f"root: {path} is a database of something other than MLflow; choose another --root")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def hardware() -> str:
    """What this runs on, in a few words: the GPU's name, or the processor's and its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores"


def git_commit() -> str:
    """Commit of the checkout around the working directory, with a `+` where it has changes; '' outside of one."""
    try:
        show = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
        if show.returncode:
            return ""
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], capture_output=True, timeout=5).returncode
    except (OSError, subprocess.SubprocessError):
        return ""
    return show.stdout.strip() + ("+" if changed else "")
