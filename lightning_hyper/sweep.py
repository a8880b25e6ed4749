"""Recipes times seeds as child processes: a few at a time, skipped when finished, resumed when cut."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml  # type: ignore[import-untyped, unused-ignore]

from lightning_hyper.recipes import resolve
from lightning_hyper.tracking import database, first_line, open_experiment

try:
    import fcntl
except ImportError:  # Windows: runs are not guarded against a second sweep
    fcntl = None  # type: ignore[assignment]

__all__ = ["SweepError", "sweep"]

CHILD = (sys.executable, "-m", "lightning_hyper")
EVERY = 60.0  # seconds between progress reports where the output is not a terminal


class SweepError(ValueError):
    """A sweep that cannot start; the message is one sentence that names the option at fault."""


@dataclass
class Job:
    """One child: a recipe with the varied values and a seed."""

    recipe: str
    name: str
    folder: Path
    budget: int | None  # frames; None where the recipe leaves it to `fit`
    arguments: list[str]
    process: subprocess.Popen[bytes] | None = None
    begins: int = 0  # where this attempt begins in the log
    fault: str = ""

    @property
    def log(self) -> Path:
        """File with all that the child prints, earlier attempts included."""
        return self.folder / "log.txt"

    def finished(self) -> dict[str, Any] | None:
        """Return what `fit` wrote at its end, if that was for at least today's budget of frames."""
        try:
            summary: dict[str, Any] = json.loads((self.folder / "finished.json").read_text(encoding="utf-8"))
            # A run that ended early on purpose, at a wanted return, has spent fewer frames than its budget.
            reached = max(int(summary["frames"]), int(summary.get("budget") or 0))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return summary if self.budget is None or reached >= self.budget else None

    def last_lines(self, count: int) -> list[str]:
        """Return the last lines of this attempt that are not blank."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(self.begins, self.log.stat().st_size - 8192))
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        return [line for line in re.split(r"[\r\n]+", text) if line.strip()][-count:]

    def progress(self) -> str:
        """Return the newest progress line of this attempt, or else its newest line."""
        lines = self.last_lines(40)
        said = [line for line in lines if line.startswith("frames ")]
        return (said or lines or ["starting"])[-1].strip()


def sweep(
    recipes: Sequence[str],
    seeds: Sequence[int],
    jobs: int = 2,
    experiment: str | None = None,
    root: str | Path = "runs",
    vary: Mapping[str, Sequence[str]] | None = None,
    overrides: Sequence[str] = (),
    *,
    tracking_uri: str | None = None,
    child: Sequence[str] = CHILD,
    patience: float = 60.0,
    output: IO[str] | None = None,
) -> int:
    """Train each recipe with each seed, `jobs` child processes at a time; called again, it does what is left.

    `vary` gives values of recipe keys, of which all combinations are run; `overrides` are passed on to each `fit`.
    Runs that are finished for their budget of frames are skipped, and those with a checkpoint are resumed. `child` is
    the command before `fit`; after Ctrl-C the children have `patience` seconds to write a checkpoint. Returns 0, 1 if
    a run failed, 130 after Ctrl-C. Raises SweepError or RecipeError before anything starts.
    """
    if jobs < 1:
        raise SweepError(f"--jobs must be at least 1, not {jobs}")
    resolved = {recipe: resolve([recipe]) for recipe in recipes}
    experiment = experiment or str(resolved[recipes[0]].get("experiment", "default"))
    root = Path(root).absolute()
    planned = _plan(resolved, seeds, experiment, root, vary or {}, list(overrides))
    parents = _Parents(tracking_uri, experiment, root, resolved)
    for job in planned:
        job.arguments += ["--parent", parents.ids[job.recipe]]
        if tracking_uri is not None:
            job.arguments += ["--tracking_uri", tracking_uri]
    try:
        return _Runner(planned, jobs, child, patience, output or sys.stdout).run()
    finally:
        parents.close(planned)


# --- planning --------------------------------------------------------------------------------------------------------


def _plan(
    recipes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    experiment: str,
    root: Path,
    vary: Mapping[str, Sequence[str]],
    overrides: list[str],
) -> list[Job]:
    """Return the jobs, seed after seed, so that all methods advance together; names must be unique."""
    if not seeds:
        raise SweepError("--seeds must name at least one seed")
    _refuse_own_options(overrides)
    combinations = [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]
    jobs: dict[str, Job] = {}
    for seed, (recipe, content), varied in itertools.product(seeds, recipes.items(), combinations):
        variant = _variant(varied)
        stem = re.sub(r"\.ya?ml$", "", recipe.rsplit("/", 1)[-1])
        slug = re.sub(r"[^\w.=+-]+", "-", variant).strip("-")
        name = "-".join(filter(None, [stem, slug, f"seed{seed}"]))
        if name in jobs:
            both = f"{jobs[name].recipe} and {recipe}" if jobs[name].recipe != recipe else f"two variants of {recipe}"
            raise SweepError(f"-c/--vary: {both} would share the run name {name}; sweep them in two experiments")
        arguments = ["fit", "-c", recipe, "--seed", str(seed), "--experiment", experiment, "--root", str(root)]
        arguments += ["--run", name]
        for key, value in varied.items():
            arguments += [f"--{key}", value]
        if variant:
            arguments += ["--variant", variant]
        budget = _budget(content, varied, overrides)
        jobs[name] = Job(recipe, name, root / experiment / name, budget, arguments + overrides)
    return list(jobs.values())


def _variant(varied: Mapping[str, str]) -> str:
    """Return what is varied, by the last part of each key, or by whole keys where two end alike."""
    last = {key: key.rsplit(".", 1)[-1] for key in varied}
    alike = len(set(last.values())) < len(last)
    return ", ".join(f"{key if alike else last[key]}={value}" for key, value in varied.items())


def _refuse_own_options(overrides: Sequence[str]) -> None:
    own = {"-c", "--config", "--seed", "--run", "--experiment", "--root", "--parent", "--tracking_uri", "--ckpt_path"}
    for option in overrides:
        if option.split("=")[0] in own:
            raise SweepError(f"{option.split('=')[0]} is set by the sweep and cannot be passed on after --")


def _budget(recipe: Mapping[str, Any], varied: Mapping[str, str], overrides: Sequence[str]) -> int | None:
    """Return the frames that a run is for: as overridden, as varied, or as in the recipe."""
    frames = varied.get("frames", recipe.get("frames"))
    for option, following in itertools.zip_longest(overrides, overrides[1:], fillvalue=""):
        if option == "--frames":
            frames = following
        elif option.startswith("--frames="):
            frames = option.partition("=")[2]
    try:
        return None if frames is None else int(yaml.safe_load(str(frames)))
    except (ValueError, TypeError, yaml.YAMLError):
        raise SweepError(f"frames: must be a number of environment frames, not {frames!r}") from None


# --- MLflow ----------------------------------------------------------------------------------------------------------


class _Parents:
    """The parent runs, one for each recipe; made before the children, so that these find the database ready."""

    def __init__(self, tracking_uri: str | None, experiment: str, root: Path, recipes: Iterable[str]) -> None:
        try:
            self.client, self.experiment = open_experiment(tracking_uri or database(root), root, experiment)
            self.ids = {recipe: self._open(recipe) for recipe in recipes}
        except Exception as error:  # MLflow's, its database's and the file system's, all for the same reason
            option = "--root" if tracking_uri is None else "--tracking-uri"
            raise SweepError(f"{option}: MLflow cannot be used there: {first_line(error)}") from error

    def _open(self, recipe: str) -> str:
        """Return the id of the recipe's parent run, set to running; an earlier sweep's is used again."""
        runs = self.client.search_runs([self.experiment], "tags.kind = 'sweep'", max_results=1000)
        for run in runs:
            if run.data.tags.get("recipe") == recipe:
                self.client.update_run(run.info.run_id, status="RUNNING")
                return str(run.info.run_id)
        tags = {"kind": "sweep", "recipe": recipe}
        return str(self.client.create_run(self.experiment, run_name=f"sweep {recipe}", tags=tags).info.run_id)

    def close(self, jobs: Sequence[Job]) -> None:
        """Set each parent to what became of its children."""
        for recipe, run_id in self.ids.items():
            mine = [job for job in jobs if job.recipe == recipe]
            failed = any(job.fault for job in mine)
            done = all(job.finished() for job in mine)
            try:
                self.client.set_terminated(run_id, "FAILED" if failed else "FINISHED" if done else "KILLED")
            except Exception as error:  # the runs themselves are safe, so the sweep's own answer stands
                print(f"MLflow: the parent run of {recipe} stays as it is: {error}".splitlines()[0], file=sys.stderr)


# --- running ---------------------------------------------------------------------------------------------------------


class _Runner:
    """Starts, watches and stops the children, and shows a line for each."""

    def __init__(self, jobs: list[Job], at_once: int, child: Sequence[str], patience: float, output: IO[str]) -> None:
        self.skipped = [job for job in jobs if job.finished()]
        self.waiting = [job for job in jobs if job not in self.skipped]
        self.running: list[Job] = []
        self.done: list[Job] = []
        self.failed: list[Job] = []
        self.at_once, self.child, self.patience, self.output = at_once, child, patience, output
        self.began = time.monotonic()
        self.told = self.began
        self.height = 0  # lines of the block that is rewritten in place

    def run(self) -> int:
        for job in self.skipped:
            self._say(f"{job.name}: finished before, skipped")
        with _stop_signals_as_interrupt():
            try:
                while self.waiting or self.running:
                    while self.waiting and len(self.running) < self.at_once:
                        self._start(self.waiting.pop(0))
                    self._collect()
                    self._show()
                    time.sleep(0.2)
            except KeyboardInterrupt:
                return self._stop()
        self._say(self._total())
        for job in self.failed:
            self._say(f"\nFAILED {job.name}: {job.fault}; log: {job.log}")
            for line in job.last_lines(5):
                self._say(f"    {line}")
        if self.failed:
            self._say("\nThe same command runs what failed again.")
        return 1 if self.failed else 0

    def _start(self, job: Job) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        resumed = (job.folder / "checkpoints" / "last.ckpt").exists()
        command = [*self.child, *job.arguments, *(["--ckpt_path", "last"] if resumed else [])]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
        with job.log.open("ab") as log:
            if not _lock(log):
                self._fail(job, "in use by another sweep that is still running")
                return
            job.begins = log.tell()
            try:
                job.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # Ctrl-C reaches the sweep alone, which then stops the children in order
                )
            except OSError as error:
                self._fail(job, f"did not start ({error})")
                return
        self.running.append(job)
        self._say(f"{job.name}: {'resumed' if resumed else 'started'}")

    def _collect(self) -> None:
        for job in [job for job in self.running if job.process and job.process.poll() is not None]:
            self.running.remove(job)
            assert job.process
            code = job.process.returncode
            if code == 0 and job.finished():
                self.done.append(job)
                self._say(f"{job.name}: finished, {job.progress()}")
            elif code == 0:
                self._fail(job, "ended without finished.json for its budget of frames")
            else:
                self._fail(job, f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}")

    def _fail(self, job: Job, fault: str) -> None:
        job.fault = fault
        self.failed.append(job)
        self._say(f"{job.name}: FAILED, {fault}")

    def _stop(self) -> int:
        """Ask the children to write a checkpoint and end; end those that have not in time, or at a second Ctrl-C."""
        self._say(f"Stopping {len(self.running)} run(s); each writes a checkpoint first (up to {self.patience:.0f} s).")
        for job in self.running:
            _signal(job, signal.SIGINT)
        try:
            deadline = time.monotonic() + self.patience
            while time.monotonic() < deadline and any(
                job.process and job.process.poll() is None for job in self.running
            ):
                time.sleep(0.1)
        except KeyboardInterrupt:
            self._say("Stopping at once.")
        late = [job for job in self.running if job.process and job.process.poll() is None]
        for job in late:
            _signal(job, signal.SIGKILL)
            assert job.process
            job.process.wait()
            self._say(f"{job.name}: did not end in time and was killed; its last checkpoint stays")
        left = [job for job in self.running + self.waiting if not job.finished()]
        self._say(f"Interrupted: {self._total(running=0, waiting=len(left))}")
        self._say("Left: " + (", ".join(job.name for job in left) or "nothing"))
        self._say("The same command continues where this one stopped.")
        return 130

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

    # What is said stays on the screen, above a block that is rewritten in place: a line for each child, and a total.

    def _say(self, text: str) -> None:
        self._clear()
        print(text, file=self.output, flush=True)

    def _show(self) -> None:
        width = max((len(job.name) for job in self.running), default=0)
        lines = [*(f"{job.name:{width}}  {job.progress()}" for job in self.running), self._total()]
        if self.output.isatty():
            columns, rows = shutil.get_terminal_size()
            self._clear()
            lines = [line[: columns - 1] for line in lines[-(rows - 1) :]]
            self.output.write("".join(f"{line}\n" for line in lines))
            self.output.flush()
            self.height = len(lines)
        elif time.monotonic() - self.told >= EVERY:
            self.told = time.monotonic()
            self._say("\n".join(lines))

    def _clear(self) -> None:
        if self.height:
            self.output.write(f"\x1b[{self.height}F\x1b[J")  # up to the block's first line, and clear to the end
            self.height = 0


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


def _signal(job: Job, number: signal.Signals) -> None:
    """Send a signal to the child and to what it started, as a terminal would."""
    assert job.process
    try:
        if hasattr(os, "killpg"):
            os.killpg(job.process.pid, number)
        else:
            job.process.send_signal(number)
    except ProcessLookupError:
        pass


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
