"""MLflow's database and experiments, for all that writes there; MLflow itself is imported when it is needed."""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from lightning_hyper.folder import Root

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"
LOCK_SECONDS = 10.0  # how long a database may be locked by somebody else before that is an error


class TrackingError(RuntimeError):
    """Runs cannot be recorded: the message names `root` or `tracking_uri` and says why."""


def database(root: str | Path) -> str:
    """Tracking URI of the database under a root folder."""
    return f"{SQLITE}{Root(Path(root)).database.resolve()}"


def file_of(tracking_uri: str) -> Path | None:
    """File of a tracking URI that is an SQLite database; None of a server's."""
    return Path(tracking_uri.removeprefix(SQLITE)) if tracking_uri.startswith(SQLITE) else None


def open_experiment(tracking_uri: str, root: str | Path, experiment: str) -> tuple[MlflowClient, str]:
    """A client, and the id of an experiment that is made, or taken out of the bin, where it must be.

    Args:
        tracking_uri: a database or server.
        root: folder whose `artifacts/` a new experiment in a database keeps its files in.
        experiment: name of the experiment.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    for noisy in ("mlflow.store.db.utils", "alembic"):  # what goes wrong is said by who calls this, in one line
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    folder, local = Root(Path(root).resolve()), file_of(tracking_uri)
    folder.path.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.lock, timeout=60):  # two processes making one database break it
        if local is not None:
            _create_database(local)
        client = MlflowClient(tracking_uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            place = (folder.artifacts / experiment).as_uri() if local is not None else None
            # Without this tag MLflow opens the experiment on its page for language models.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return client, str(client.create_experiment(experiment, artifact_location=place, tags=kind))
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
    from mlflow import MlflowClient

    partial = path.with_name(path.name + ".part")
    for left in (partial, Path(f"{partial}-journal")):  # SQLite would play an old journal into the new file
        left.unlink(missing_ok=True)
    MlflowClient(f"sqlite:///{partial}").search_experiments(max_results=1)
    os.replace(partial, path)


def first_line(error: Exception) -> str:
    """What an error of MLflow says, without its long explanations."""
    lines = [line for line in str(error).strip().splitlines() if not line.startswith("(raised as a result of")]
    return (lines or [type(error).__name__])[0]
