"""A run that stops and continues equals one that never stopped, bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

TINY = Path(__file__).parents[1] / "tiny.yaml"
TINY_TD3 = Path(__file__).parents[1] / "tiny_td3.yaml"
TINY_RETRIEVAL = Path(__file__).parents[1] / "tiny_retrieval.yaml"
SAC = ("--model", "SAC", "--model.normalize_observation", "true", "--model.normalize_reward", "true")
SHORT_WINDOWS = ("--data.steps", "4")  # batches that cut through trials


def checkpoint(run, name="last"):
    return torch.load(Path("runs/tiny") / run / f"checkpoints/{name}.ckpt", weights_only=True)


def assert_same(a, b):
    for key, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][key]), key
    assert a["frames"] == b["frames"]
    for left, right in zip(a["optimizer_states"], b["optimizer_states"], strict=True):
        for index, state in left["state"].items():
            for key, value in state.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(right["state"][index][key]))
    assert torch.equal(a["ranks"][0]["generators"]["torch"], b["ranks"][0]["generators"]["torch"])
    for left, right in zip(a["ranks"], b["ranks"], strict=True):
        assert_equal(left["algorithm"], right["algorithm"])


def assert_equal(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    else:
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@pytest.mark.parametrize("options", [(), SHORT_WINDOWS, ("--model.init_args.lr_schedule", "linear")])
def test_k_plus_k_frames_equal_2k_frames(tiny, options):
    assert tiny("fit", "--run", "whole", *options) == 0
    assert tiny("fit", "--run", "parts", "--trainer.max_steps", "32", *options) == 0
    assert checkpoint("parts")["frames"] < checkpoint("whole")["frames"]
    assert tiny("fit", "--run", "parts", "--ckpt_path", "last", *options) == 0
    assert_same(checkpoint("whole"), checkpoint("parts"))


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--data.init_args.prioritized", "[0.6, 0.4]", "--data.init_args.n_step", "3"),
        ("--data.init_args.storage", "memmap", "--data.init_args.capacity", "400"),
        SAC,
    ],
)
def test_k_plus_k_frames_of_replay_equal_2k_frames(tiny, options):
    assert tiny("fit", "--run", "whole", *options, recipe=TINY_TD3) == 0
    assert tiny("fit", "--run", "parts", "--trainer.max_steps", "60", *options, recipe=TINY_TD3) == 0
    assert 0 < checkpoint("parts")["frames"] < checkpoint("whole")["frames"]
    assert tiny("fit", "--run", "parts", "--ckpt_path", "last", *options, recipe=TINY_TD3) == 0
    assert_same(checkpoint("whole"), checkpoint("parts"))


VI = ("--model.context.class_path", "VariationalContext", "--model.context.trials", "8")


@pytest.mark.parametrize("options", [VI, (*VI, *SHORT_WINDOWS)])
def test_k_plus_k_frames_of_a_belief_and_its_trials_equal_2k_frames(tiny, options):
    assert tiny("fit", "--run", "whole", *options) == 0
    assert tiny("fit", "--run", "parts", "--trainer.max_steps", "40", *options) == 0
    assert 0 < checkpoint("parts")["frames"] < checkpoint("whole")["frames"]
    assert tiny("fit", "--run", "parts", "--ckpt_path", "last", *options) == 0
    whole = checkpoint("whole")
    assert len(whole["ranks"][0]["algorithm"]["inference"]["lengths"]) > 8
    assert_same(whole, checkpoint("parts"))


KEPT_KEYS = ("--model.init_args.retriever.init_args.refresh", "3")


@pytest.mark.parametrize("options", [(), KEPT_KEYS, ("--data.init_args.env.init_args.engine", "minigrid")])
def test_k_plus_k_frames_with_a_memory_equal_2k_frames(tiny, options):
    assert tiny("fit", "--run", "whole", *options, recipe=TINY_RETRIEVAL) == 0
    assert tiny("fit", "--run", "parts", "--trainer.max_steps", "32", *options, recipe=TINY_RETRIEVAL) == 0
    assert checkpoint("parts")["frames"] == 384
    assert tiny("fit", "--run", "parts", "--ckpt_path", "last", *options, recipe=TINY_RETRIEVAL) == 0
    whole = checkpoint("whole")
    assert (whole["ranks"][0]["algorithm"]["memory"]["stamps"] > 0).all()
    assert_same(whole, checkpoint("parts"))


def test_a_replay_buffer_lies_beside_its_checkpoint_and_goes_with_it(tiny):
    assert tiny("fit", "--run", "r", "--checkpoint.every", "160", recipe=TINY_TD3) == 0
    folder = Path("runs/tiny/r/checkpoints")
    named = {torch.load(path, weights_only=True)["frames"] for path in folder.glob("*.ckpt")}
    assert {int(path.name.removeprefix("replay-")) for path in folder.glob("replay-*")} == named
    assert {160, 320} <= named
    assert len(list(folder.glob("replay-*"))) < 320 // 40


def test_a_run_that_goes_on_from_an_older_checkpoint_leaves_the_replay_buffers_of_newer_ones(tiny):
    assert tiny("fit", "--run", "r", "--checkpoint.every", "160", recipe=TINY_TD3) == 0
    folder = Path("runs/tiny/r/checkpoints")
    older = ("--checkpoint.every", "160", "--ckpt_path", str(folder / "frames=160.ckpt"), "--frames", "240")
    assert tiny("fit", "--run", "r", *older, recipe=TINY_TD3) == 0
    named = {path.name: torch.load(path, weights_only=True)["frames"] for path in folder.glob("*.ckpt")}
    assert (named["last.ckpt"], named["frames=320.ckpt"]) == (240, 320)
    assert {int(path.name.removeprefix("replay-")) for path in folder.glob("replay-*")} == set(named.values())


def test_no_replay_buffer_is_deleted_beside_a_checkpoint_that_cannot_be_read(tiny):
    assert tiny("fit", "--run", "r", "--frames", "80", recipe=TINY_TD3) == 0
    folder = Path("runs/tiny/r/checkpoints")
    (folder / "copied.ckpt").write_bytes((folder / "last.ckpt").read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"copied\.ckpt is truncated .* no replay buffer is deleted"):
        assert tiny("fit", "--run", "r", "--ckpt_path", "last", "--frames", "160", recipe=TINY_TD3) == 0
    assert (folder / "replay-80").exists()


@pytest.mark.parametrize("fault", ["missing", "truncated", "of another task"])
def test_a_broken_replay_buffer_is_refused_and_named(tiny, fault, capsys):
    assert tiny("fit", "--run", "r", "--frames", "80", recipe=TINY_TD3) == 0
    frames = Path("runs/tiny/r/checkpoints/replay-80/rank-0/frames.pt")
    if fault == "missing":
        frames.unlink()
    elif fault == "truncated":
        frames.write_bytes(frames.read_bytes()[:1000])
    else:
        state = torch.load(frames, weights_only=True)
        state["frames"]["observation"] = state["frames"]["observation"][:, :3]
        torch.save(state, frames)
    assert tiny("fit", "--run", "r", "--ckpt_path", "last", recipe=TINY_TD3) == 2
    said = capsys.readouterr().err
    assert "ckpt_path" in said
    assert fault in said
    assert "frames.pt" in said


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(tiny, monkeypatch, capsys):
    assert tiny("fit", "--run", "r", "--frames", "80", recipe=TINY_TD3) == 0
    folder, save = Path("runs/tiny/r/checkpoints"), torch.save
    before = {path.name for path in folder.glob("replay-*")}

    def full(state, path, *arguments, **options):
        if Path(path).name == "frames.pt":
            Path(path).write_bytes(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        save(state, path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert tiny("fit", "--run", "r", "--ckpt_path", "last", recipe=TINY_TD3) == 2
    assert "cannot write a checkpoint" in capsys.readouterr().err
    assert {path.name for path in folder.glob("replay-*")} == before
    assert tiny("fit", "--run", "r", "--ckpt_path", "last", recipe=TINY_TD3) == 0
    assert checkpoint("r")["frames"] == 320


@pytest.mark.parametrize("recipe", [TINY, TINY_TD3, TINY_RETRIEVAL])
def test_evaluation_never_changes_training(tiny, recipe):
    assert tiny("fit", "--run", "with", recipe=recipe) == 0
    assert tiny("fit", "--run", "without", "--data.evaluate_every", "null", recipe=recipe) == 0
    assert_same(checkpoint("with"), checkpoint("without"))


def evaluations(run):
    """Return of each evaluation of a run by its frame."""
    from mlflow import MlflowClient

    history = MlflowClient(f"sqlite:///{Path('runs/mlflow.db').resolve()}").get_metric_history
    return {m.step: m.value for m in history(checkpoint(run)["run_id"], "eval/return")}


def test_resume_continues_the_same_mlflow_run(tiny):
    from mlflow import MlflowClient

    tiny("fit", "--run", "one", "--frames", "640")
    tiny("fit", "--run", "one", "--ckpt_path", "last", "--frames", "1280")
    client = MlflowClient(f"sqlite:///{Path('runs/mlflow.db').resolve()}")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert len(runs) == 1
    assert runs[0].info.status == "FINISHED"
    assert list(evaluations("one")) == [320, 640, 960, 1280]


def test_evaluations_come_at_the_same_frames_after_a_stop_between_them(tiny):
    tiny("fit", "--run", "whole", "--frames", "1280")
    tiny("fit", "--run", "cut", "--frames", "480")
    tiny("fit", "--run", "cut", "--ckpt_path", "last", "--frames", "1280")
    cut = evaluations("cut")
    assert list(cut) == [320, 480, 640, 960, 1280]
    del cut[480]
    assert cut == evaluations("whole")


def command(*arguments, recipe=TINY, frames=32_000):
    return [sys.executable, "-m", "lightning_hyper", "fit", "-c", str(recipe), "--frames", str(frames), *arguments]


@pytest.mark.parametrize(("recipe", "frames"), [(TINY, 32_000), (TINY_TD3, 1_600), (TINY_RETRIEVAL, 1_920)])
def test_kill_minus_nine_then_resume_equals_uninterrupted(tmp_path, recipe, frames, campaign):
    """Really kills the process: before the first checkpoint is whole, in mid-training, and at any moment."""
    given = {"recipe": recipe, "frames": frames}
    subprocess.run(command("--run", "whole", **given), cwd=tmp_path, check=True, capture_output=True)
    os.chdir(tmp_path)
    pick = random.Random(campaign)
    for moment in ["first", "fresh", *(pick.choice(["fresh", "any"]) for _ in range(2 * (campaign - 1)))]:
        kill(given, moment, pick)
    last = ("--ckpt_path", "last") if checkpoints("killed") else ()
    subprocess.run(command("--run", "killed", *last, **given), check=True, capture_output=True)
    assert_same(checkpoint("whole"), checkpoint("killed"))
    assert metrics("whole") == metrics("killed")
    assert [run.info.status for run in runs("killed")].count("FINISHED") == 1
    assert not [run for run in runs("killed") if run.info.status == "RUNNING"]


def checkpoints(run):
    return list(Path("runs/tiny", run, "checkpoints").glob("*.ckpt"))


def kill(given, moment, pick):
    """Start or continue the run `killed`, and kill it; it may come to its end before that."""
    folder = Path("runs/tiny/killed/checkpoints")
    last, there = folder / "last.ckpt", bool(checkpoints("killed"))
    seen = last.stat().st_mtime_ns if there else 0
    started, delay = time.monotonic(), pick.uniform(0, 0.4) if moment != "any" else pick.uniform(0, 12)
    process = subprocess.Popen(
        command("--run", "killed", *(("--ckpt_path", "last") if there else ()), **given),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None:
        if moment == "first" and folder.exists():
            break
        if moment == "fresh" and last.exists() and last.stat().st_mtime_ns != seen:
            time.sleep(delay)
            break
        if moment == "any" and time.monotonic() > started + delay:
            break
        time.sleep(0.001)
    process.kill()
    process.wait()


def runs(name):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{Path('runs/mlflow.db').resolve()}")
    experiment = client.get_experiment_by_name("tiny").experiment_id
    return client.search_runs([experiment], f"tags.`mlflow.runName` = '{name}'")


def metrics(name):
    """All metrics of a run, over frames; where a frame was logged again, the later value."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{Path('runs/mlflow.db').resolve()}")
    (run,) = (run for run in runs(name) if run.info.status == "FINISHED")
    found = {}
    for key in run.data.metrics:
        if not key.startswith("time/"):
            rows = sorted(client.get_metric_history(run.info.run_id, key), key=lambda row: row.timestamp)
            found[key] = dict(sorted({row.step: row.value for row in rows}.items()))
    return found


def test_ctrl_c_writes_a_checkpoint_marks_the_run_killed_and_resumes(tmp_path):
    from mlflow import MlflowClient

    process = subprocess.Popen(
        command("--run", "stopped", "--frames", "10000000"), cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    with process.stdout:
        process.stdout.readline()  # the first evaluation is over
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    os.chdir(tmp_path)
    stopped = checkpoint("stopped")
    assert not Path("runs/tiny/stopped/finished.json").exists()
    client = MlflowClient(f"sqlite:///{Path('runs/mlflow.db').resolve()}")
    assert client.get_run(stopped["run_id"]).info.status == "KILLED"
    budget = str(stopped["frames"] + 640)
    again = command("--run", "stopped", "--ckpt_path", "last", "--frames", budget)
    subprocess.run(again, check=True, capture_output=True)
    assert json.loads(Path("runs/tiny/stopped/finished.json").read_text())["frames"] == int(budget)


def test_a_signal_to_one_of_two_ranks_stops_both(tmp_path):
    ranks = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--run", "r")
    process = subprocess.Popen(
        command(*ranks, frames=10_000_000), cwd=tmp_path, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    )
    with process.stdout:
        assert "frames" in process.stdout.readline()  # the first evaluation is over
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (second,) = (pid for pid in children if b"lightning_hyper" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(int(second), signal.SIGTERM)
        assert process.wait(timeout=120) == 130
    assert not (tmp_path / "runs/tiny/r/finished.json").exists()


def test_a_run_that_is_being_written_is_left_to_its_process(tmp_path):
    process = subprocess.Popen(
        command("--run", "r", frames=10_000_000),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process.stdout:
        while not (tmp_path / "runs/tiny/r/checkpoints/last.ckpt").exists():  # it waits for MLflow
            assert process.poll() is None
            time.sleep(0.01)
        again = subprocess.run(
            command("--run", "r", "--ckpt_path", "last"), cwd=tmp_path, capture_output=True, text=True
        )
        assert again.returncode == 2
        assert "being written by another process" in again.stderr
        process.send_signal(signal.SIGHUP)  # a terminal that is closed
        assert process.wait(timeout=60) == 130


@pytest.mark.parametrize(
    ("key", "value"), [("seed", "3"), ("weights", "x.ckpt"), ("experiment", "other"), ("run", "b")]
)
def test_what_a_continued_run_cannot_change_is_refused(tiny, capsys, key, value):
    assert tiny("fit", "--run", "a", "--frames", "160") == 0
    there = "runs/tiny/a/checkpoints/last.ckpt"
    assert tiny("fit", "--ckpt_path", there, f"--{key}", value, "--frames", "320") == 2
    assert f"{key} is " in capsys.readouterr().err
    assert tiny("fit", "--ckpt_path", there, "--frames", "320") == 0
    assert checkpoint("a")["frames"] == 320


def test_a_copied_checkpoint_begins_a_run_of_its_own(tiny):
    assert tiny("fit", "--run", "a", "--frames", "160", "--seed", "3") == 0
    before = sorted(Path().rglob("*"))
    shutil.copyfile("runs/tiny/a/checkpoints/last.ckpt", "copied.ckpt")
    assert tiny("fit", "--run", "b", "--ckpt_path", "copied.ckpt", "--frames", "320") == 0
    new = set(Path().rglob("*")) - set(before) - {Path("copied.ckpt")}
    assert all(path.is_relative_to("runs/tiny/b") or path.is_relative_to("runs/artifacts") for path in new)
    assert tiny("fit", "--run", "a", "--ckpt_path", "last", "--frames", "320", "--seed", "3") == 0
    assert_same(checkpoint("a"), checkpoint("b"))
    assert checkpoint("a")["run_id"] != checkpoint("b")["run_id"]


def test_the_cure_for_nan_is_taken_when_the_run_goes_on(tiny):
    assert tiny("fit", "--run", "a", "--frames", "160") == 0
    cure = ("--model.lr", "1e-4", "--model.max_grad_norm", "0.1")
    assert tiny("fit", "--run", "a", "--ckpt_path", "last", "--frames", "320", *cure) == 0
    groups = checkpoint("a")["optimizer_states"][0]["param_groups"]
    assert {group["lr"] for group in groups} == {1e-4}


def test_a_limit_of_the_trainers_finishes_nothing(tiny, caplog):
    assert tiny("fit", "--run", "a", "--trainer.max_steps", "32") == 0
    assert not Path("runs/tiny/a/finished.json").exists()
    assert "continue with --ckpt_path last" in caplog.text
    assert [run.info.status for run in runs("a")] == ["KILLED"]


def test_checkpoints_go_straight_to_their_place(tiny, monkeypatch):
    save, places = torch.save, []
    monkeypatch.setattr(
        torch, "save", lambda state, file: (places.append(getattr(file, "name", None)), save(state, file))
    )
    assert tiny("fit", "--run", "a", "--frames", "160") == 0
    assert places
    assert all(Path(place).resolve().parent == Path("runs/tiny/a/checkpoints").resolve() for place in places)


@pytest.mark.parametrize(("recipe", "frames"), [(TINY, 2560), (TINY_TD3, 400), (TINY_RETRIEVAL, 960)])
def test_two_ranks_stopped_and_continued_equal_two_that_never_stopped(tmp_path, recipe, frames):
    ranks = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
    # A limit of steps is what makes Lightning hand states of loaders back on continuing.
    for run, steps, *options in (("whole", 9999), ("parts", 40), ("parts", 9999, "--ckpt_path", "last")):
        limit = ("--trainer.max_steps", str(steps))
        started = command("--run", run, *ranks, *limit, *options, recipe=recipe, frames=frames)
        subprocess.run(started, cwd=tmp_path, check=True, capture_output=True)
    os.chdir(tmp_path)
    whole, parts = checkpoint("whole"), checkpoint("parts")
    assert_same(whole, parts)
    generators = [rank["generators"]["torch"] for rank in whole["ranks"]]
    assert not torch.equal(*generators)
    assert torch.equal(generators[1], parts["ranks"][1]["generators"]["torch"])
