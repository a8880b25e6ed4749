"""Where the runs of a sweep are executed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import IO, Protocol

from lightning_hyper.sweep.plan import Job

try:
    import fcntl
except ImportError:  # Windows: runs are not guarded against a second sweep
    fcntl = None  # type: ignore[assignment]

CHILD = (sys.executable, "-m", "lightning_hyper")


class LaunchError(RuntimeError):
    """A run that did not start; the message says why."""


class Launcher(Protocol):
    """Executes runs. What a run prints is appended to `job.folder.log`, which is read for its progress."""

    def start(self, job: Job, arguments: Sequence[str]) -> None:
        """Begin to run `lightning-hyper` with these arguments.

        Raises:
            LaunchError: it did not start.
        """

    def code(self, job: Job) -> int | None:
        """Return the exit code of a run that was started, minus a signal's number where that ended it, or None."""

    def interrupt(self, job: Job) -> None:
        """Ask a run to write a checkpoint and end."""

    def kill(self, job: Job) -> None:
        """End a run at once, with all that it has started, and wait for its end."""


class LocalProcesses:
    """Runs as processes of this machine, each in a session of its own.

    Args:
        command: what goes before the arguments.
    """

    def __init__(self, command: Sequence[str] = CHILD) -> None:
        self.command = list(command)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, job: Job, arguments: Sequence[str]) -> None:
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
        with job.folder.log.open("ab") as log:
            if not _lock(log):
                raise LaunchError("in use by another sweep that is still running")
            try:
                self._processes[job.name] = subprocess.Popen(
                    [*self.command, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # Ctrl-C reaches the sweep alone, which then stops the children in order
                )
            except OSError as error:
                raise LaunchError(f"did not start ({error})") from error

    def code(self, job: Job) -> int | None:
        return self._processes[job.name].poll()

    def interrupt(self, job: Job) -> None:
        self._signal(job, signal.SIGINT)

    def kill(self, job: Job) -> None:
        self._signal(job, signal.SIGKILL)
        self._processes[job.name].wait()

    def _signal(self, job: Job, number: signal.Signals) -> None:
        """Send a signal to the child and to what it started, as a terminal would."""
        process = self._processes[job.name]
        try:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
        except ProcessLookupError:
            pass


def _lock(log: IO[bytes]) -> bool:
    """Lock the log; the child inherits the lock, which so lasts as long as the child, even if the sweep is killed."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True
