"""`lightning-hyper ui` answers before it says so, shows each experiment's runs, and leaves nothing running."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from lightning_hyper import ui
from lightning_hyper.cli import main
from lightning_hyper.folder import Root
from lightning_hyper.tracking import open_experiment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experiments with a run each, and one without."""
    root = tmp_path_factory.mktemp("runs")
    tracking = f"sqlite:///{root / 'mlflow.db'}"
    for begun, name in ((2_000, "newer"), (1_000, "older"), (None, "empty")):
        client, number = open_experiment(tracking, root, name)
        if begun is not None:
            client.create_run(number, start_time=begun, run_name="a", tags={"kind": "fit"})
    return root


@pytest.fixture
def command(root: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    port = free_port()
    words = [sys.executable, "-m", "lightning_hyper", "ui", "--root", str(root), "--port", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield process, port
    process.terminate()  # which ends the server, where the test has not
    process.communicate(timeout=20)


def of_the_server(port: int) -> list[str]:
    """Command lines of all processes in the session of the server of a port."""
    processes = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            session = (entry / "stat").read_text().rpartition(")")[2].split()[3]
            processes.append((session, (entry / "cmdline").read_text().replace("\0", " ")))
        except OSError:  # ended meanwhile
            continue
    servers = {session for session, words in processes if f"--port {port} --workers" in words}
    return [words for session, words in processes if session in servers]


@pytest.mark.slow
def test_it_answers_when_it_says_so_and_a_signal_ends_all_of_it(
    command: tuple[subprocess.Popen[str], int], root: Path
) -> None:
    process, port = command
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(4)]
    links = [
        re.fullmatch(r"(\w+):  (http://127\.0\.0\.1:(\d+)/#/experiments/(\d+)/runs\?(\S+))\n", line) for line in said
    ]
    assert [link[1] if link else None for link in links] == [None, "newer", "older", None]  # the newest first
    for link in filter(None, links):
        assert int(link[3]) == port
        assert link[5] == "workflowType=machine_learning&viewStateShareKey=runs"
        tags = MlflowClient(f"sqlite:///{root / 'mlflow.db'}").get_experiment(link[4]).tags
        view = json.loads(tags["mlflow.sharedViewState.runs"])
        assert view["searchFilter"] == "tags.kind = 'fit'"
        assert "metrics.`eval/return`" in view["selectedColumns"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as page:
        assert b"MLflow" in page.read()
    # MLflow's command and one server, no runner of jobs.
    assert len(of_the_server(port)) == 2, of_the_server(port)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 130
    assert of_the_server(port) == []
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


def test_a_port_in_use_is_one_sentence_before_anything_starts(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["ui", "--root", str(root), "--port", str(port)]) == 2
    said = capsys.readouterr()
    assert (
        said.err
        == f"lightning-hyper ui: error: --port: {port} cannot be used (Address already in use); name another one\n"
    )
    assert said.out == ""


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, root: Path) -> Iterator[Callable[[str], None]]:
    """`serve(script)`: as in the command, with a script in place of MLflow; what the signals do is put back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    start = subprocess.Popen

    def serve(script: str) -> None:
        command = [sys.executable, "-c", script]
        monkeypatch.setattr(subprocess, "Popen", lambda words, **options: start(command, **options))
        ui.serve(Root(root), free_port())

    yield serve
    for number in numbers:
        signal.signal(number, before[number])


def test_a_server_that_ends_is_told_with_its_last_words(serve: Callable[[str], None]) -> None:
    with pytest.raises(ui.UIError, match="MLflow ended: it went wrong"):
        serve("print('first'); print('it went wrong'); print()")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_signal_ends_it(
    number: signal.Signals, serve: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: list[subprocess.Popen[bytes]] = []

    def signalled(process: subprocess.Popen[bytes], port: int) -> None:
        servers.append(process)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(ui, "_wait_until_it_answers", signalled)
    with pytest.raises(KeyboardInterrupt):
        serve("import time; time.sleep(60)")
    assert servers[0].returncode == -signal.SIGKILL


def test_what_the_server_has_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ui, "_on_signals", lambda handler: None)
    grandchild = (
        "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", grandchild]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    number = int(process.stdout.readline())
    ui._end(process)
    process.stdout.close()
    for _ in range(50):
        try:
            state = Path(f"/proc/{number}/stat").read_text().split()[2]
        except OSError:
            return
        if state == "Z":  # ended, and its parent with it
            return
        time.sleep(0.1)
    os.kill(number, signal.SIGKILL)
    pytest.fail("still runs")
