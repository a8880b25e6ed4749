"""Starting, watching and stopping the runs of a sweep."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from lightning_hyper.sweep.launch import Launcher, LaunchError
from lightning_hyper.sweep.plan import Job

EVERY = 60.0  # seconds between progress reports where the output is not a terminal


class Watch:
    """Has a launcher run the jobs, a few at a time, and shows a line for each.

    Args:
        jobs: in the order in which they are begun; those that are finished are skipped.
        at_once: how many run at a time.
        launcher: executes them.
        patience: seconds that they have after Ctrl-C to write a checkpoint.
        output: where all is told.
    """

    def __init__(self, jobs: list[Job], at_once: int, launcher: Launcher, patience: float, output: IO[str]) -> None:
        self.skipped = [job for job in jobs if job.finished()]
        self.waiting = [job for job in jobs if job not in self.skipped]
        self.running: list[Job] = []
        self.done: list[Job] = []
        self.failed: list[Job] = []
        self.at_once, self.launcher, self.patience = at_once, launcher, patience
        self.began = time.monotonic()
        self.board = Board(output)

    def run(self) -> int:
        """Run all; gives the sweep's exit code."""
        say = self.board.say
        for job in self.skipped:
            say(f"{job.name}: finished before, skipped")
        with _stop_signals_as_interrupt():
            try:
                while self.waiting or self.running:
                    while self.waiting and len(self.running) < self.at_once:
                        self._start(self.waiting.pop(0))
                    self._collect()
                    self.board.show([(job.name, job.progress()) for job in self.running], self._total())
                    time.sleep(0.2)
            except KeyboardInterrupt:
                return self._stop()
        say(self._total())
        for job in self.failed:
            say(f"\nFAILED {job.name}: {job.fault}; log: {job.folder.log}")
            for line in job.last_lines(5):
                say(f"    {line}")
        if self.failed:
            say("\nThe same command runs what failed again.")
        return 1 if self.failed else 0

    def _start(self, job: Job) -> None:
        log = job.folder.log
        log.parent.mkdir(parents=True, exist_ok=True)
        job.begins = log.stat().st_size if log.exists() else 0
        resumed = job.folder.last.exists()
        try:
            self.launcher.start(job, [*job.arguments, *(["--ckpt_path", "last"] if resumed else [])])
        except LaunchError as error:
            self._fail(job, str(error))
            return
        self.running.append(job)
        self.board.say(f"{job.name}: {'resumed' if resumed else 'started'}")

    def _collect(self) -> None:
        for job, code in [(job, self.launcher.code(job)) for job in self.running]:
            if code is None:
                continue
            self.running.remove(job)
            if code == 0 and job.finished():
                self.done.append(job)
                self.board.say(f"{job.name}: finished, {job.progress()}")
            elif code == 0:
                self._fail(job, "ended without finished.json for its budget of frames")
            else:
                self._fail(job, f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}")

    def _fail(self, job: Job, fault: str) -> None:
        job.fault = fault
        self.failed.append(job)
        self.board.say(f"{job.name}: FAILED, {fault}")

    def _stop(self) -> int:
        """Ask the runs to write a checkpoint and end; end those that have not in time, or at a second Ctrl-C."""
        say, count = self.board.say, len(self.running)
        say(f"Stopping {count} run(s); each writes a checkpoint first (up to {self.patience:.0f} s).")
        for job in self.running:
            self.launcher.interrupt(job)
        try:
            deadline = time.monotonic() + self.patience
            while time.monotonic() < deadline and self._alive():
                time.sleep(0.1)
        except KeyboardInterrupt:
            say("Stopping at once.")
        for job in self._alive():
            self.launcher.kill(job)
            say(f"{job.name}: did not end in time and was killed; its last checkpoint stays")
        left = [job for job in self.running + self.waiting if not job.finished()]
        say(f"Interrupted: {self._total(running=0, waiting=len(left))}")
        say("Left: " + (", ".join(job.name for job in left) or "nothing"))
        say("The same command continues where this one stopped.")
        return 130

    def _alive(self) -> list[Job]:
        return [job for job in self.running if self.launcher.code(job) is None]

    def _total(self, running: int | None = None, waiting: int | None = None) -> str:
        counts = {
            "finished": len(self.done),
            "skipped": len(self.skipped),
            "failed": len(self.failed),
            "running": len(self.running) if running is None else running,
            "left" if waiting is not None else "waiting": len(self.waiting) if waiting is None else waiting,
        }
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        shown = ", ".join(f"{count} {word}" for word, count in counts.items() if count or word == "finished")
        return f"sweep  {shown}  {minutes // 60}:{minutes % 60:02}:{seconds:02}"


class Board:
    """What is said stays on the screen, above a block that is rewritten in place: a line for each run, and a total.

    Args:
        output: a terminal; elsewhere the block is printed once in a while.
    """

    def __init__(self, output: IO[str]) -> None:
        self.output = output
        self.told = time.monotonic()
        self.height = 0  # lines of the block

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._clear()
        print(text, file=self.output, flush=True)

    def show(self, runs: list[tuple[str, str]], total: str) -> None:
        """Show how far each run is, by name."""
        width = max((len(name) for name, _ in runs), default=0)
        lines = [*(f"{name:{width}}  {progress}" for name, progress in runs), total]
        if self.output.isatty():
            columns, rows = shutil.get_terminal_size()
            self._clear()
            lines = [line[: columns - 1] for line in lines[-(rows - 1) :]]
            self.output.write("".join(f"{line}\n" for line in lines))
            self.output.flush()
            self.height = len(lines)
        elif time.monotonic() - self.told >= EVERY:
            self.told = time.monotonic()
            self.say("\n".join(lines))

    def _clear(self) -> None:
        if self.height:
            self.output.write(f"\x1b[{self.height}F\x1b[J")  # up to the block's first line, and clear to the end
            self.height = 0


@contextmanager
def _stop_signals_as_interrupt() -> Iterator[None]:
    """Take a closed terminal or a polite kill for Ctrl-C: the children have sessions of their own and would go on."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        names = []
    before = {name: signal.signal(getattr(signal, name), interrupt) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
