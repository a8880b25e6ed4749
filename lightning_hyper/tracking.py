"""MLflow's database and experiments, for all that writes there; MLflow itself is imported when it is needed."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from lightning_hyper.folder import Root, RunFolder

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"
LOCK_SECONDS = 10.0  # how long a database may be locked by somebody else before that is an error
CREATION_SECONDS = 600.0  # how long other processes may take to make it, one after the other
FOLDER_TAG = "folder"  # of a run: its folder, relative to the root


class TrackingError(RuntimeError):
    """Runs cannot be recorded: the message names `root` or `tracking_uri` and says why."""


def database(root: str | Path) -> str:
    """Tracking URI of the database under a root folder."""
    return f"{SQLITE}{Root(Path(root)).database.resolve()}"


def file_of(tracking_uri: str) -> Path | None:
    """File of a tracking URI that is an SQLite database; None of a server's."""
    return Path(tracking_uri.removeprefix(SQLITE)) if tracking_uri.startswith(SQLITE) else None


def without_password(text: str) -> str:
    """A text in which addresses show no password."""
    return re.sub(r"(://[^/\s:@]*):[^/\s@]*@", r"\1:***@", text)


def connect(root: str | Path, tracking_uri: str | None = None) -> MlflowClient:
    """A client of a server, or of the database under a root folder, which may have been moved.

    Args:
        root: folder of the runs.
        tracking_uri: server; the database under the root by default.
    """
    folder = Root(Path(root).resolve())
    uri = tracking_uri or database(folder.path)
    if (local := file_of(uri)) == folder.database and local.exists():
        _follow_artifacts(local, folder.artifacts)
    return _client(uri)


def _client(uri: str) -> MlflowClient:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the address may hold a password
    from mlflow import MlflowClient

    for noisy in ("mlflow.store.db.utils", "alembic"):  # what goes wrong is said by who calls this, in one line
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    return MlflowClient(uri)


def _follow_artifacts(path: Path, artifacts: Path) -> None:
    """Let a database that was moved with its root find the files there: MLflow keeps absolute addresses."""
    with closing(sqlite3.connect(path, timeout=LOCK_SECONDS)) as connection, connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone():
            return
        for key, place in connection.execute("SELECT experiment_id, artifact_location FROM experiments").fetchall():
            before, _, name = str(place).rpartition("/")
            now = f"{artifacts.as_uri()}/{name}"
            if place != now and before.startswith("file:") and before.endswith(f"/{artifacts.name}"):
                connection.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (now, key))
                connection.execute(
                    "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) "
                    "WHERE experiment_id = ? AND substr(artifact_uri, 1, ?) = ?",
                    (now, len(place) + 1, key, len(place), place),
                )


def close_abandoned(client: MlflowClient, root: str | Path, experiment_id: str, but: str = "") -> None:
    """Set the runs to KILLED that MLflow takes for running, though nobody writes in their folders any more.

    Args:
        client: of the database or server.
        root: folder of the runs; those of another machine's are left alone.
        experiment_id: the experiment.
        but: MLflow id of a run that is known to be alive, and whose folder is nobody else's.
    """
    found = client.search_runs([experiment_id], "attributes.status = 'RUNNING'", max_results=1000)
    mine = {run.data.tags.get(FOLDER_TAG) for run in found if run.info.run_id == but} - {None}
    for run in found:
        folder = run.data.tags.get(FOLDER_TAG)
        if run.info.run_id == but or folder is None:
            continue
        if folder in mine or RunFolder(Path(root) / folder).abandoned():
            client.set_terminated(run.info.run_id, "KILLED")


def open_experiment(tracking_uri: str, root: str | Path, experiment: str) -> tuple[MlflowClient, str]:
    """A client, and the id of an experiment that is made, or taken out of the bin, where it must be.

    Args:
        tracking_uri: a database or server.
        root: folder whose `artifacts/` a new experiment in a database keeps its files in.
        experiment: name of the experiment.
    """
    folder, local = Root(Path(root).resolve()), file_of(tracking_uri)
    folder.path.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.lock, timeout=CREATION_SECONDS):  # two processes making one database break it
        if local is not None:
            _create_database(local)
        client = connect(folder.path, tracking_uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            place = (folder.artifacts / experiment).as_uri() if local is not None else None
            # Without this tag MLflow opens the experiment on its page for language models.
            tags = {
                "mlflow.experimentKind": "custom_model_development",
                "mlflow.note.content": "Training runs, one for each method, environment, variant and seed.\n\n"
                f"Tables and curves: `lightning-hyper report --experiment {experiment}`",
            }
            return client, str(client.create_experiment(experiment, artifact_location=place, tags=tags))
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return client, str(found.experiment_id)


def check_database(path: Path) -> None:
    """Find out in milliseconds what MLflow would take minutes to say; a database that is not there is not made.

    Raises:
        TrackingError: the database is locked, unwritable, corrupt or foreign.
    """
    fault = f"root: the MLflow database {path} cannot be used"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if not os.access(path.parent, os.W_OK):
                raise PermissionError(f"{path.parent} is not writable")
            return
        with closing(sqlite3.connect(path, timeout=LOCK_SECONDS)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.OperationalError as error:
        cure = "end the program that holds it" if "locked" in str(error) else "make it writable, or choose another root"
        raise TrackingError(f"{fault} ({error}); {cure}") from error
    except sqlite3.DatabaseError as error:
        raise TrackingError(f"{fault} ({error}); move the file away, or choose another root") from error
    except OSError as error:
        raise TrackingError(f"{fault} ({error}); choose another root") from error
    if tables and "experiments" not in tables:
        raise TrackingError(f"{fault}: it is a database of something other than MLflow; choose another root")


def _create_database(path: Path) -> None:
    """Make the database beside its place: one cut short by a kill there is beyond repair for MLflow."""
    if path.exists() and path.stat().st_size > 0:
        return
    partial = path.with_name(path.name + ".part")
    for left in (partial, Path(f"{partial}-journal")):  # SQLite would play an old journal into the new file
        left.unlink(missing_ok=True)
    _client(f"{SQLITE}{partial}").search_experiments(max_results=1)
    os.replace(partial, path)


def first_line(error: Exception) -> str:
    """What an error of MLflow says, without its long explanations and without passwords."""
    lines = [line for line in str(error).strip().splitlines() if not line.startswith("(raised as a result of")]
    return without_password((lines or [type(error).__name__])[0])
