"""Runs in MLflow: metrics over frames, sent by a thread of their own; one run from first start to last resume."""

from __future__ import annotations

import atexit
import json
import os
import platform
import queue
import re
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn  # type: ignore[attr-defined]

from lightning_hyper.checks import RecipeError
from lightning_hyper.folder import Root
from lightning_hyper.layering import flatten
from lightning_hyper.tracking import TrackingError, check_database, database, file_of, first_line, open_experiment

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from lightning_hyper.algorithms import FrameClock

RETRY_SECONDS = 5.0  # between two tries to send what failed
END_SECONDS = 15.0  # how long the end of a run waits for what failed; one try at a locked database is 20 s in MLflow


class MLflowLogger(Logger):
    """Logs one run to MLflow, with frames as the x axis.

    Everything is sent by one background thread, which also imports MLflow and opens the run, so that training begins
    at once and is never held up. What cannot be sent is tried again; what is unsent at the end is written to
    `unsent_metrics.jsonl` in the run's folder.

    Args:
        root: folder under which everything lies.
        experiment: name of the MLflow experiment.
        run: name of the run.
        clock: its frames are the x axis; without one, the step that is given.
        tracking_uri: MLflow server; the database under `root` by default.
        tags: tags of the run.
        parent: MLflow id of the run that this one belongs to.
        run_id: MLflow id of a run to continue.

    Raises:
        TrackingError: by `open` or the first call after, if the database or server cannot be used.
    """

    def __init__(
        self,
        root: str | Path = "runs",
        experiment: str = "default",
        run: str = "run",
        *,
        clock: FrameClock | None = None,
        tracking_uri: str | None = None,
        tags: Mapping[str, str] | None = None,
        parent: str | None = None,
        run_id: str | None = None,
    ) -> None:
        super().__init__()
        self.root, self.experiment_name, self.run_name = Path(root).resolve(), experiment, run
        self.tracking_uri = tracking_uri or database(root)
        self.tags = {**(tags or {}), **({"mlflow.parentRunId": parent} if parent else {})}
        self.clock = clock
        self._run_id = run_id
        self._jobs: queue.Queue[Callable[[], None]] = queue.Queue()
        self._fault: TrackingError | None = None
        self._unsent: list[dict[str, Any]] = []
        self._try_again = 0.0
        self._warned = False
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
        """MLflow id of the run, once it is open; `run_id` waits for it."""
        return self._run_id

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        x = self.clock.frames if self.clock is not None else step or 0
        # A name that MLflow refuses would never be sent.
        rows = {re.sub(r"[^\w\-. :/]", "_", k, flags=re.A): float(v) for k, v in metrics.items() if k != "epoch"}
        if rows:
            entry = {"metrics": rows, "step": x, "timestamp": int(time.time() * 1000)}
            self._enqueue(lambda: self._send(entry))
            self._start()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        leaves = flatten(vars(params) if isinstance(params, Namespace) else params)
        flat = {key[:250]: str(value)[:500] for key, value in leaves.items()}  # limits of MLflow servers, old and new
        self._enqueue(lambda: self._record_parameters(flat))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run by Lightning's word for it; `failed` is KILLED when it comes of Ctrl-C or SIGTERM.

        A run whose recipe is refused before anything is sent is not recorded at all.
        """
        # Lightning has one word for all of these, and says it inside its `except`.
        error = sys.exc_info()[1]
        if isinstance(error, RecipeError) and not self._started:
            self._abandon()
        else:
            interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            self.finish("FINISHED" if status != "failed" else "KILLED" if interrupted else "FAILED")

    # What the package asks of it beyond that.

    @rank_zero_only
    def open(self) -> None:
        """Begin, or continue, the run. A database that cannot be used is an error at once; a server, a little later."""
        if self._thread is None:
            if (file := file_of(self.tracking_uri)) is not None:
                check_database(file)
            self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
            self._jobs.put(self._begin)
            atexit.register(self._leave)

    @rank_zero_only
    def finish(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED; of several calls the first that is not FINISHED counts."""
        if self._thread is None or self._fault is not None or self._status in ("FAILED", "KILLED"):
            return
        self._status = status
        self._start()
        self._jobs.put(self._send_last)
        self._jobs.put(lambda: self._client.set_terminated(self._id, status))
        self._jobs.join()

    @rank_zero_only
    def log_text(self, text: str, artifact: str) -> None:
        """Keep a text as an artifact."""
        self._enqueue(lambda: self._client.log_text(self._id, text, artifact))

    @rank_zero_only
    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a file as an artifact."""
        self._enqueue(lambda: self._client.log_artifact(self._id, str(path), folder))

    def run_id(self) -> str | None:
        """MLflow id of the run; waits until the run is open. None on ranks other than zero."""
        if rank_zero_only.rank == 0 and self._run_id is None:  # type: ignore[attr-defined]
            self.flush()
        return self._run_id

    def flush(self) -> None:
        """Wait until everything so far is sent."""
        self.open()
        self._start()
        self._jobs.join()
        if self._fault is not None:
            raise self._fault

    # The thread's side.

    def _start(self) -> None:
        # Not in `open`: importing MLflow, some seconds of Python, would hold up the first update through the
        # interpreter's lock. The first metrics come after it.
        if self._thread is not None and not self._started:
            self._thread.start()

    @property
    def _started(self) -> bool:
        return self._thread is not None and self._thread.ident is not None

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
                rank_zero_warn(f"MLflow at {self.tracking_uri}: {first_line(error)}")
            finally:
                self._jobs.task_done()

    def _begin(self) -> None:
        try:
            self._client, experiment = open_experiment(self.tracking_uri, self.root, self.experiment_name)
            if self._run_id is None:
                run = self._client.create_run(experiment, run_name=self.run_name, tags=dict(self.tags))
                self._run_id = run.info.run_id
            else:
                self._client.update_run(self._run_id, status="RUNNING")
                for key, value in self.tags.items():
                    self._client.set_tag(self._run_id, key, value)
        except Exception as error:
            key = "root" if self.tracking_uri == database(self.root) else "tracking_uri"
            self._fault = TrackingError(f"{key}: MLflow at {self.tracking_uri} cannot be used: {first_line(error)}")

    def _send(self, entry: dict[str, Any]) -> None:
        self._unsent.append(entry)
        if time.monotonic() >= self._try_again:
            self._send_unsent()

    def _send_unsent(self) -> None:
        from mlflow.entities import Metric

        try:
            while self._unsent:
                entry = self._unsent[0]
                at, step = entry["timestamp"], entry["step"]
                rows = [Metric(key, value, at, step) for key, value in entry["metrics"].items()]
                self._client.log_batch(self._id, metrics=rows)
                del self._unsent[0]
        except Exception as error:
            self._try_again = time.monotonic() + RETRY_SECONDS
            if not self._warned:
                self._warned = True
                rank_zero_warn(f"MLflow at {self.tracking_uri}: {first_line(error)}; training goes on, sent later")

    def _send_last(self) -> None:
        """Send what is unsent, for some time; then write it to a file."""
        end = time.monotonic() + END_SECONDS
        self._send_unsent()
        while self._unsent and time.monotonic() < end:
            time.sleep(1.0)
            self._send_unsent()
        if self._unsent:
            path = Root(self.root).run(self.experiment_name, self.run_name).unsent
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in self._unsent)
            rank_zero_warn(f"{len(self._unsent)} rows of metrics could not be sent to MLflow; they are in {path}")
            self._unsent.clear()

    @property
    def _id(self) -> str:
        assert self._run_id is not None  # jobs come after `_begin`, and none is done if that failed
        return self._run_id

    def _abandon(self) -> None:
        """Forget the run, of which nothing is sent yet."""
        atexit.unregister(self._leave)
        self._thread, self._jobs = None, queue.Queue()

    def _leave(self) -> None:
        """When Python ends: nothing queued may be lost with the thread, and a run that nobody ended has failed."""
        if self._status is None:
            self.finish("FAILED")
        self._jobs.join()

    def _record_parameters(self, flat: dict[str, str]) -> None:
        from mlflow.entities import Param

        there = self._client.get_run(self._id).data.params
        for key, value in flat.items():
            if there.get(key, value) != value:
                self._client.set_tag(self._id, f"changed:{key}", value)
        new = [Param(key, value) for key, value in flat.items() if key not in there]
        for start in range(0, len(new), 100):
            self._client.log_batch(self._id, params=new[start : start + 100])


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
