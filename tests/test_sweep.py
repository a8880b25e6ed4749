"""Sweeps run, skip, resume, survive failures and stop in order; children are a stub that writes what `fit` writes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from lightning_hyper.checks import RecipeError
from lightning_hyper.sweep import LocalProcesses, SweepError, sweep

# Trains by waiting: a last.ckpt at once, a line of progress every 20 ms, finished.json at the end. How is said by keys
# of a recipe, because a sweep refuses others.
STUB = """
import json, os, signal, sys, time
from pathlib import Path
words = [word for argument in sys.argv[2:] for word in (argument.split("=", 1) if argument[:2] == "--" else [argument])]
options = dict(zip(words[::2], words[1::2]))
folder = Path(options["--root"]) / options["--experiment"] / options["--run"]
started = folder / "started.jsonl"
with started.open("a") as file:
    threads = os.environ.get("OMP_NUM_THREADS")
    file.write(json.dumps({"argv": sys.argv[1:], "threads": threads, "session": os.getsid(0)}) + "\\n")
(folder / "checkpoints").mkdir(exist_ok=True)
(folder / "checkpoints" / "last.ckpt").touch()
def interrupt(number, frame):
    if options.get("--trainer.stubborn") == "1":
        print("not now", flush=True)
        return
    print("Stopped, checkpoint written", flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, interrupt)
steps = int(options.get("--trainer.steps", 2))
frames = int(options.get("--frames", 100))
for step in range(steps):
    if options.get("--trainer.crash") == options["--seed"]:
        print("Traceback\\nRuntimeError: loss is not finite", flush=True)
        sys.exit(1)
    done = frames * (step + 1) // steps
    print(f"frames {done:,}/{frames:,}  41,230 frames/s  eval/return {step:.1f}", flush=True)
    time.sleep(float(options.get("--trainer.pause", 0.02)))
(folder / "finished.json").write_text(json.dumps({"frames": frames, "budget": frames, "eval/return": 1.0}))
"""


class Lab:
    """A root with a database, two recipes and a stub in the place of `python -m lightning_hyper`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "runs"
        (folder / "stub.py").write_text(STUB)
        (folder / "rnn.yaml").write_text("frames: 100")
        (folder / "rnn_hn.yaml").write_text("frames: 100")
        self.recipe, self.other = str(folder / "rnn.yaml"), str(folder / "rnn_hn.yaml")
        self.launcher = LocalProcesses([sys.executable, str(folder / "stub.py")])
        self.said = ""

    def sweep(self, experiment: str, recipes: Sequence[str] = (), seeds: Sequence[int] = (0, 1), **options: Any) -> int:
        output = io.StringIO()
        try:
            return sweep(
                recipes or [self.recipe],
                seeds,
                experiment=experiment,
                root=self.root,
                launcher=self.launcher,
                output=output,
                **options,
            )
        finally:
            self.said = output.getvalue()

    def starts(self, experiment: str, run: str) -> list[dict[str, Any]]:
        path = self.root / experiment / run / "started.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def parents(self, experiment: str) -> dict[str, Mapping[str, str]]:
        client = MlflowClient(tracking_uri=f"sqlite:///{self.root / 'mlflow.db'}")
        found = client.get_experiment_by_name(experiment)
        runs = client.search_runs([found.experiment_id])
        return {run.info.run_name: {"id": run.info.run_id, "status": run.info.status, **run.data.tags} for run in runs}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("sweep"))


def option(start: Mapping[str, Any], name: str) -> str:
    return str(start["argv"][start["argv"].index(name) + 1])


def test_every_recipe_runs_with_every_seed_under_its_parent(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert lab.sweep("grid", [lab.recipe, lab.other], [0, 3]) == 0
    parents = lab.parents("grid")
    assert set(parents) == {f"sweep {lab.recipe}", f"sweep {lab.other}"}
    for recipe, stem in ((lab.recipe, "rnn"), (lab.other, "rnn_hn")):
        parent = parents[f"sweep {recipe}"]
        assert (parent["status"], parent["kind"]) == ("FINISHED", "sweep")
        for seed in (0, 3):
            (start,) = lab.starts("grid", f"{stem}-seed{seed}")
            assert start["argv"][:3] == ["fit", "-c", recipe]
            assert option(start, "--seed") == str(seed)
            assert option(start, "--parent") == parent["id"]
            assert "--variant" not in start["argv"]
            assert "--ckpt_path" not in start["argv"]
            assert start["threads"] == "1"
            assert start["session"] != os.getsid(0)
    assert "frames 100/100" in (lab.root / "grid" / "rnn-seed0" / "log.txt").read_text()
    assert "4 finished" in lab.said


def test_threads_chosen_by_the_user_stay(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    lab.sweep("threads", seeds=[0])
    assert lab.starts("threads", "rnn-seed0")[0]["threads"] == "3"


def test_variants_are_all_combinations_and_named(lab: Lab) -> None:
    vary = {"model.init_args.lr": ["0.001", "1e-4"], "model.init_args.gamma": ["0.9"]}
    assert lab.sweep("vary", seeds=[0], vary=vary, overrides=["--trainer.steps", "1"]) == 0
    (start,) = lab.starts("vary", "rnn-lr=0.001-gamma=0.9-seed0")
    assert "--model.init_args.lr=0.001" in start["argv"]
    assert option(start, "--variant") == "lr=0.001, gamma=0.9"
    assert option(start, "--trainer.steps") == "1"
    assert len(lab.starts("vary", "rnn-lr=1e-4-gamma=0.9-seed0")) == 1


def test_what_is_varied_joins_the_variant_of_the_recipe(lab: Lab) -> None:
    named = lab.folder / "named.yaml"
    named.write_text("{frames: 100, variant: small}")
    assert lab.sweep("joined", [str(named)], [0], vary={"model.init_args.lr": ["0.1"]}) == 0
    assert option(lab.starts("joined", "named-lr=0.1-seed0")[0], "--variant") == "small, lr=0.1"


def test_layers_are_swept_as_one_recipe(lab: Lab) -> None:
    (lab.folder / "_long.yaml").write_text("frames: 200")
    composed = f"{lab.recipe}+{lab.folder / '_long.yaml'}"
    assert lab.sweep("composed", [composed], seeds=[0], overrides=["--frames=150"]) == 0
    (start,) = lab.starts("composed", "rnn-long-seed0")
    assert start["argv"][:3] == ["fit", "-c", composed]
    assert set(lab.parents("composed")) == {f"sweep {composed}"}
    # The later layer's budget counts, which the stub does not know of.
    assert lab.sweep("composed", [composed], seeds=[0]) == 1
    assert "ended without finished.json for its budget" in lab.said


class Recorded:
    """A launcher without processes: a run is over when it is asked for the second time."""

    def __init__(self) -> None:
        self.started: list[tuple[str, list[str]]] = []
        self.asked: dict[str, int] = {}
        self.running: set[str] = set()
        self.most = 0

    def start(self, job: Any, arguments: Sequence[str]) -> None:
        self.started.append((job.name, list(arguments)))
        self.running.add(job.name)
        self.most = max(self.most, len(self.running))

    def code(self, job: Any) -> int | None:
        self.asked[job.name] = self.asked.get(job.name, 0) + 1
        if self.asked[job.name] < 2:
            return None
        self.running.discard(job.name)
        job.folder.finish({"frames": 100, "budget": 100})
        return 0

    def interrupt(self, job: Any) -> None: ...

    def kill(self, job: Any) -> None: ...


def test_another_launcher_may_execute_the_runs(lab: Lab) -> None:
    launcher = Recorded()
    assert sweep([lab.recipe], [0, 1], experiment="elsewhere", root=lab.root, launcher=launcher) == 0
    assert [name for name, _ in launcher.started] == ["rnn-seed0", "rnn-seed1"]
    assert all(arguments[:3] == ["fit", "-c", lab.recipe] for _, arguments in launcher.started)
    assert lab.parents("elsewhere")[f"sweep {lab.recipe}"]["status"] == "FINISHED"


def test_finished_runs_are_skipped_until_the_budget_grows(lab: Lab) -> None:
    assert lab.sweep("skip") == 0
    parent = lab.parents("skip")[f"sweep {lab.recipe}"]["id"]
    assert lab.sweep("skip") == 0
    assert "2 skipped" in lab.said
    assert len(lab.starts("skip", "rnn-seed0")) == 1
    assert lab.sweep("skip", overrides=["--frames", "50"]) == 0
    assert len(lab.starts("skip", "rnn-seed0")) == 1
    assert lab.sweep("skip", overrides=["--frames=200"], seeds=[0]) == 0
    _, resumed = lab.starts("skip", "rnn-seed0")
    assert option(resumed, "--ckpt_path") == "last"
    assert option(resumed, "--parent") == parent
    assert len(lab.parents("skip")) == 1


def test_a_run_that_was_cut_is_resumed(lab: Lab) -> None:
    checkpoint = lab.root / "cut" / "rnn-seed0" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    (checkpoint.parents[1] / "finished.json").write_text('{"frames": 1')  # cut while it was written
    assert lab.sweep("cut", seeds=[0]) == 0
    assert option(lab.starts("cut", "rnn-seed0")[0], "--ckpt_path") == "last"


def test_one_failure_stops_no_other_and_is_reported_with_its_last_lines(lab: Lab) -> None:
    assert lab.sweep("crash", seeds=[0, 1, 2], jobs=1, overrides=["--trainer.crash", "1"]) == 1
    assert "2 finished, 1 failed" in lab.said
    assert f"FAILED rnn-seed1: exit code 1; log: {lab.root / 'crash' / 'rnn-seed1' / 'log.txt'}" in lab.said
    assert "RuntimeError: loss is not finite" in lab.said
    assert lab.parents("crash")[f"sweep {lab.recipe}"]["status"] == "FAILED"
    assert lab.sweep("crash", seeds=[0, 1, 2]) == 0
    assert lab.parents("crash")[f"sweep {lab.recipe}"]["status"] == "FINISHED"


def test_no_more_than_jobs_run_at_a_time(lab: Lab) -> None:
    launcher = Recorded()
    assert sweep([lab.recipe], range(5), jobs=2, experiment="jobs", root=lab.root, launcher=launcher) == 0
    assert len(launcher.started) == 5
    assert launcher.most == 2


def test_a_run_in_use_by_another_sweep_is_left_alone(lab: Lab) -> None:
    fcntl = pytest.importorskip("fcntl")
    log = lab.root / "busy" / "rnn-seed0" / "log.txt"
    log.parent.mkdir(parents=True)
    with log.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert lab.sweep("busy") == 1
    assert "in use by another sweep" in lab.said
    assert lab.starts("busy", "rnn-seed0") == []
    assert len(lab.starts("busy", "rnn-seed1")) == 1


def start_in_background(lab: Lab, experiment: str, *overrides: str, patience: float = 20) -> subprocess.Popen[str]:
    code = (
        "import sys\nfrom lightning_hyper.sweep import LocalProcesses, sweep\n"
        f"launcher = LocalProcesses({lab.launcher.command!r})\n"
        f"sys.exit(sweep([{lab.recipe!r}], [0, 1, 2], 2, {experiment!r}, {str(lab.root)!r}, launcher=launcher,"
        f" patience={patience}, overrides=['--trainer.pause', '0.5', '--trainer.steps', '100', *{list(overrides)!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that runs the tests in its background has them, and so their children, ignore an interrupt.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    logs = [lab.root / experiment / f"rnn-seed{seed}" / "log.txt" for seed in (0, 1)]
    deadline = time.monotonic() + 60
    while not all(log.exists() and "frames" in log.read_text() for log in logs):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_lets_the_children_write_a_checkpoint(lab: Lab, number: signal.Signals) -> None:
    experiment = f"interrupt-{number.name}"
    process = start_in_background(lab, experiment)
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Left: rnn-seed0, rnn-seed1, rnn-seed2" in said
    assert "continues" in said
    for seed in (0, 1):
        assert "checkpoint written" in (lab.root / experiment / f"rnn-seed{seed}" / "log.txt").read_text()
    assert lab.parents(experiment)[f"sweep {lab.recipe}"]["status"] == "KILLED"
    assert lab.sweep(experiment, seeds=[0, 1, 2]) == 0
    assert option(lab.starts(experiment, "rnn-seed0")[1], "--ckpt_path") == "last"


def test_a_child_that_does_not_end_in_time_is_killed(lab: Lab) -> None:
    process = start_in_background(lab, "stubborn", "--trainer.stubborn", "1", patience=0.5)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "was killed" in said
    for seed in (0, 1):
        session = lab.starts("stubborn", f"rnn-seed{seed}")[0]["session"]
        with pytest.raises(ProcessLookupError):
            os.kill(session, 0)


def test_faults_are_told_before_anything_starts(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="--jobs"):
        lab.sweep("faults", jobs=0)
    with pytest.raises(SweepError, match="--seeds"):
        sweep([lab.recipe], [], experiment="faults", root=lab.root)
    with pytest.raises(SweepError, match="--seed is set by the sweep"):
        lab.sweep("faults", overrides=["--seed=3"])
    with pytest.raises(SweepError, match=r"frames: .*'many'"):
        lab.sweep("faults", overrides=["--frames", "many"])
    with pytest.raises(RecipeError, match=r"--framez: .*did you mean --frames"):
        lab.sweep("faults", overrides=["--framez", "5"])
    with pytest.raises(RecipeError, match="--modle"):
        lab.sweep("faults", vary={"modle.lr": ["1"]})
    twin = tmp_path / "rnn.yaml"
    twin.write_text("frames: 100")
    with pytest.raises(SweepError, match="run name rnn-seed0"):
        lab.sweep("faults", [lab.recipe, str(twin)])
    with pytest.raises(ValueError, match=r"gone\.yaml"):
        lab.sweep("faults", [lab.recipe, "gone.yaml"])
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(SweepError, match="--root: MLflow cannot be used there"):
        sweep([lab.recipe], [0], root=blocked)
    assert not (lab.root / "faults").exists()
