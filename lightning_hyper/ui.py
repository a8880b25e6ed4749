"""MLflow's pages on the runs under a root: one server process, and a view of the run table for each experiment."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from typing import Any

from lightning_hyper.folder import Root

HOST = "127.0.0.1"
START_SECONDS = 180.0  # how long MLflow may take to answer; 13 s were measured on two busy cores
VIEW = "runs"  # name of our view of the run table
COLUMNS = (
    "tags.`environment`",
    "tags.`method`",
    "tags.`variant`",
    "tags.`seed`",
    "metrics.`eval/return`",
    "metrics.`eval/best_return`",
)
WIDTHS = {"tags.`seed`": 70, "metrics.`eval/best_return`": 130}  # pixels, where it is not MLflow's


class UIError(RuntimeError):
    """The pages cannot be served; the message is one sentence that names the option at fault."""


def serve(root: Root, port: int) -> None:
    """Serve MLflow's pages and print a link to each experiment's run table, until a signal ends it.

    SIGINT, SIGTERM and SIGHUP end all processes of the server.

    Args:
        root: folder of the runs.
        port: of 127.0.0.1.

    Raises:
        UIError: the database is not there, the port cannot be used, or MLflow does not start.
        KeyboardInterrupt: a signal came.
    """
    if not root.database.is_file():
        raise UIError(f"--root: {root.database} does not exist; train first, or name the --root of the runs")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UIError(f"--port: {port} cannot be used ({error.strerror}); name another one") from None
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{root.database}"]
    command += ["--default-artifact-root", str(root.artifacts), "--host", HOST, "--port", str(port)]
    # MLflow's four workers and its runners of jobs import it all at once, so that none of them answers in time where
    # cores are few or busy.
    command += ["--workers", "1"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    _on_signals(_interrupt)
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all its processes can be ended together
        )
        try:
            print("MLflow starts ...", flush=True)
            _wait_until_it_answers(process, port)
            for name, link in _links(port):
                print(f"{name}:  {link}")
            print("Ctrl-C ends it.", flush=True)
            process.wait()
            raise UIError(f"MLflow has ended: {_last_line(log)}")
        except TimeoutError as error:
            raise UIError(f"MLflow {error}: {_last_line(log)}") from None
        finally:
            _end(process)


def _on_signals(handler: Any) -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), handler)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _wait_until_it_answers(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=10):
                return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError("ended" if process.poll() is not None else f"did not answer within {START_SECONDS:.0f} s")


def _links(port: int) -> list[tuple[str, str]]:
    """Name and link of each experiment with runs, the one with the newest run first."""
    begun = []
    for experiment in _ask(port, "experiments/search", max_results=1000).get("experiments", []):
        newest = {"experiment_ids": [experiment["experiment_id"]], "order_by": ["start_time DESC"], "max_results": 1}
        for run in _ask(port, "runs/search", **newest).get("runs", []):
            begun.append((run["info"]["start_time"], experiment["name"], experiment["experiment_id"]))
    links = []
    for _, name, number in sorted(begun, reverse=True):
        _ask(port, "experiments/set-experiment-tag", experiment_id=number, **_view())
        place = f"http://{HOST}:{port}/#/experiments/{number}/runs"
        links.append((name, f"{place}?workflowType=machine_learning&viewStateShareKey={VIEW}"))
    return links


def _view() -> dict[str, str]:
    """The tag of an experiment in which MLflow keeps a view of its run table that a link can name."""
    state = {
        "searchFilter": "tags.kind = 'fit'",
        "orderByKey": "tags.`mlflow.runName`",  # by another order than that of time, runs do not hide below sweeps
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": COLUMNS,
        "columnOrder": ["attributes.`Run Name`", "runDateAndNestInfo", "duration", *COLUMNS],
        "columnWidths": WIDTHS,
    }
    return {"key": f"mlflow.sharedViewState.{VIEW}", "value": json.dumps(state)}


def _ask(port: int, what: str, **content: Any) -> dict[str, Any]:
    """What MLflow's REST interface answers."""
    request = urllib.request.Request(
        f"http://{HOST}:{port}/api/2.0/mlflow/{what}",
        json.dumps(content).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def _last_line(log: Any) -> str:
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server with all that it has started, at once; a further signal does not cut this short."""
    _on_signals(signal.SIG_IGN)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    process.wait()
