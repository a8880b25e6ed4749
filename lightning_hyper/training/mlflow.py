"""Runs in MLflow: metrics over frames, sent by a thread of their own; one run from first start to last resume."""

from __future__ import annotations

import atexit
import math
import queue
import re
import sys
import threading
import time
import zlib
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn  # type: ignore[attr-defined]

from lightning_hyper.folder import Root
from lightning_hyper.layering import flatten
from lightning_hyper.tracking import (
    FOLDER_TAG,
    TrackingError,
    check_database,
    close_abandoned,
    database,
    file_of,
    first_line,
    open_experiment,
    without_password,
)
from lightning_hyper.training.journal import Journal

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    from lightning_hyper.algorithms import FrameClock

RETRY_SECONDS = 5.0  # between two tries to send what failed
NAME, VALUE, TAG = 250, 500, 5000  # characters of a name, a parameter and a tag that any MLflow server takes
RETURN, BEST = "eval/return", "eval/best_return"  # the columns of a run's results
MOST_METRICS = 1000  # of one request
END_SECONDS = 15.0  # how long the end of a run waits for what failed; one try at a locked database is 20 s in MLflow


class MLflowLogger(Logger):
    """Logs one run to MLflow, with frames as the x axis.

    Metrics are written to `metrics.jsonl` in the run's folder, and sent from there by one background thread, which also
    imports MLflow and opens the run, so that training begins at once and is never held up. What cannot be sent is tried
    again, and what is unsent at the end is sent when the run is continued. A run that MLflow no longer has is recorded
    anew, with all its metrics.

    Args:
        root: folder under which everything lies.
        experiment: name of the MLflow experiment.
        run: name of the run.
        clock: its frames are the x axis; without one, the step that is given.
        tracking_uri: MLflow server; the database under `root` by default.
        tags: tags of the run.
        parent: MLflow id of the run that this one belongs to.
        run_id: MLflow id of a run to continue.
        frames: of the checkpoint that it is continued from; None begins anew.

    Attributes:
        begun: whether training has.

    Raises:
        RecipeError: experiment or run is no name of a folder.
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
        frames: int | None = None,
    ) -> None:
        super().__init__()
        self.root, self.experiment_name, self.run_name = Path(root).resolve(), experiment, run
        self.tracking_uri = tracking_uri or database(root)
        self._place = f"MLflow at {without_password(self.tracking_uri)}"
        self.tags = {
            **{key: shortened(value, TAG) for key, value in (tags or {}).items() if value},
            **({"mlflow.parentRunId": parent} if parent else {}),
            FOLDER_TAG: f"{experiment}/{run}",
        }
        self.clock = clock
        self._folder, self._frames = Root(self.root).run(experiment, run), frames
        self._run_id, self._made = run_id, int(time.time() * 1000)
        self._jobs: queue.Queue[Callable[[], None]] = queue.Queue()
        self._fault: TrackingError | None = None
        self._journal: Journal | None = None
        self.begun = False
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
        rows = {metric_name(key): float(value) for key, value in metrics.items() if key != "epoch"}
        if rows:
            if self._journal is None:
                self._journal = Journal(self._folder, self._frames)
            self._journal.append(rows, x, int(time.time() * 1000))
            self._enqueue(self._send)
            self._start()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        leaves = flatten(vars(params) if isinstance(params, Namespace) else params)
        known = {key: value for key, value in leaves.items() if value is not None}
        flat = {shortened(key, NAME): shortened(str(value), VALUE) for key, value in known.items()}
        self._enqueue(lambda: self._record_parameters(flat))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run by Lightning's word for it; `failed` is KILLED when it comes of Ctrl-C or SIGTERM.

        A run that fails before training has begun is not recorded at all.
        """
        if status == "failed" and not self.begun and not self._started:
            self._abandon()
        else:
            # Lightning has one word for all of these, and says it inside its `except`.
            interrupted = isinstance(sys.exc_info()[1], KeyboardInterrupt | SystemExit)
            self.finish("FINISHED" if status != "failed" else "KILLED" if interrupted else "FAILED")

    # What the package asks of it beyond that.

    @rank_zero_only
    def open(self) -> None:
        """Open, or continue, the run. A database that cannot be used is an error at once; a server, a little later."""
        if self._thread is None:
            if (file := file_of(self.tracking_uri)) is not None:
                check_database(file)
            self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
            self._jobs.put(self._begin)
            atexit.register(self._leave)

    @rank_zero_only
    def begin(self) -> None:
        """Say that training begins: from here on the run is recorded, whatever becomes of it."""
        self.open()
        self.begun = True
        self._journal = Journal(self._folder, self._frames)

    @rank_zero_only
    def finish(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED; of several calls the first that is not FINISHED counts."""
        if self._thread is None or self._fault is not None or self._status in ("FAILED", "KILLED"):
            return
        self._status = status
        self._start()
        self._jobs.put(self._send_last)
        self._jobs.put(self._describe)
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
            except Exception as error:  # whatever MLflow raises must not end the thread, nor a warning made an error
                with suppress(Warning):
                    rank_zero_warn(f"{self._place}: {first_line(error)}")
            finally:
                self._jobs.task_done()

    def _begin(self) -> None:
        try:
            self._client, experiment = open_experiment(self.tracking_uri, self.root, self.experiment_name)
            if self._run_id is not None and not self._is_there(self._run_id):
                self._run_id = None
            if self._run_id is None:
                run = self._client.create_run(experiment, self._made, dict(self.tags), self.run_name)
                self._run_id = run.info.run_id
                if self._journal is not None:
                    self._journal.mark(0)
            else:
                self._client.update_run(self._run_id, status="RUNNING")
                for key, value in self.tags.items():
                    self._client.set_tag(self._run_id, key, value)
            close_abandoned(self._client, self.root, experiment, but=self._id)
        except Exception as error:
            key = "root" if self.tracking_uri == database(self.root) else "tracking_uri"
            self._fault = TrackingError(f"{key}: {self._place} cannot be used: {first_line(error)}")

    def _is_there(self, run_id: str) -> bool:
        """Whether MLflow has the run, and has it for this folder's, not for one that this folder was copied from."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        here = self.tags[FOLDER_TAG]
        return run.info.lifecycle_stage == "active" and run.data.tags.get(FOLDER_TAG, here) == here

    def _send(self) -> None:
        """Send what is unsent, unless that has just failed."""
        if time.monotonic() < self._try_again:
            return
        try:
            self._send_all()
        except Exception as error:
            self._try_again = time.monotonic() + RETRY_SECONDS
            if not self._warned:
                self._warned = True
                rank_zero_warn(f"{self._place}: {first_line(error)}; training goes on, sent later")

    def _send_all(self) -> None:
        from mlflow.entities import Metric

        while self._journal is not None:
            rows, end = self._journal.unsent(MOST_METRICS)
            if not rows:
                return
            metrics = [
                Metric(key, value, row["timestamp"], row["step"])
                for row in rows
                for key, value in row["metrics"].items()
            ]
            self._log(metrics)
            self._journal.mark(end)

    def _describe(self) -> None:
        """Say what the run is, with its final and best return and its command, where people browse."""
        tags = self.tags
        what = f"**{tags.get('method') or self.run_name} on {tags.get('environment') or 'an environment'}**"
        lines = [", ".join(filter(None, [what, tags.get("variant"), f"seed {tags.get('seed', '?')}"])) + "."]
        history = self._client.get_metric_history(self._id, RETURN)
        finite = [row for row in history if math.isfinite(row.value)]
        if finite:
            last, best = max(finite, key=lambda row: (row.step, row.timestamp)), max(row.value for row in finite)
            self._client.log_metric(self._id, BEST, best, step=last.step)
            lines.append(f"Final return {last.value:.2f} at {last.step:,} frames, best {best:.2f}.")
        if "command" in tags:
            lines.append(f"```\n{tags['command']}\n```")
        self._client.set_tag(self._id, "mlflow.note.content", "\n\n".join(lines))

    def _log(self, metrics: Sequence[Metric]) -> None:
        """Send metrics; one that is refused must not hold back the others."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(self._id, metrics=metrics)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if len(metrics) == 1:
                rank_zero_warn(f"MLflow does not take the metric {metrics[0].key!r}: {first_line(error)}")
                return
            for metric in metrics:
                self._log([metric])

    def _send_last(self) -> None:
        """Send what is unsent, for some time."""
        end = time.monotonic() + END_SECONDS
        while True:
            self._try_again = 0.0
            self._send()
            if self._journal is None or not (rows := self._journal.unsent(MOST_METRICS)[0]):
                return
            if time.monotonic() >= end:
                break
            time.sleep(1.0)
        rank_zero_warn(
            f"the metrics from frame {rows[0]['step']:,} on could not be sent to MLflow; they are in "
            f"{self._folder.metrics}, and are sent when the run is continued with --ckpt_path last"
        )

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
        if self._status is None and (self.begun or self._started):
            self.finish("FAILED")
        if self._started:
            self._jobs.join()

    def _record_parameters(self, flat: dict[str, str]) -> None:
        from mlflow.entities import Param

        there = self._client.get_run(self._id).data.params
        for key, value in flat.items():
            if there.get(key, value) != value:
                self._client.set_tag(self._id, shortened(f"changed:{key}", NAME), value)
        new = [Param(key, value) for key, value in flat.items() if key not in there]
        for start in range(0, len(new), 100):
            self._client.log_batch(self._id, params=new[start : start + 100])


def metric_name(name: str) -> str:
    """The nearest name that MLflow takes for a metric: characters, length, and no path that means another."""
    plain = re.sub(r"[^\w\-. :/]", "_", name, flags=re.A)
    parts = [re.sub(r"^\.\.?$", "_", part) for part in plain.split("/") if part]
    return shortened("/".join(parts) or "_", NAME)


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters; of a longer one the beginning, and digits that differ where it differs."""
    if len(text) <= most:
        return text
    return f"{text[: most - 9]}_{zlib.crc32(text.encode()):08x}"
