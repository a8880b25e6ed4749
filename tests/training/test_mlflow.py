import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from mlflow import MlflowClient
from mlflow.utils.validation import _validate_metric_name

from lightning_hyper.checks import RecipeError
from lightning_hyper.folder import Root
from lightning_hyper.tracking import close_abandoned, connect, without_password
from lightning_hyper.training import mlflow as tracking
from lightning_hyper.training.machine import git_commit, hardware
from lightning_hyper.training.mlflow import MLflowLogger, TrackingError, metric_name


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """One database for the module: creating one takes seconds."""
    root = tmp_path_factory.mktemp("runs")
    MLflowLogger(root, "first", "first").run_id()  # waits for the database
    return root


@pytest.fixture
def client(root):
    return MlflowClient(f"sqlite:///{root}/mlflow.db")


@pytest.fixture
def refusing(root):
    """A database that refuses every row of metrics, at once, until it is told otherwise."""

    def allow(yes):
        with sqlite3.connect(root / "mlflow.db") as connection:
            connection.execute("DROP TRIGGER IF EXISTS refuse")
            if not yes:
                connection.execute(
                    "CREATE TRIGGER refuse BEFORE INSERT ON metrics BEGIN SELECT RAISE(FAIL, 'refused'); END"
                )
        connection.close()

    yield allow
    allow(True)


def history(client, run_id, key):
    return [(row.step, row.value) for row in client.get_metric_history(run_id, key)]


def test_metrics_lie_over_frames_and_lightnings_epoch_is_left_out(root, client):
    clock = SimpleNamespace(frames=15_360)
    logger = MLflowLogger(root, "exp", "frames", clock=clock)
    logger.log_metrics({"train/return": 1.5, "epoch": 3, "odd[name]": 2.0}, step=7)
    clock.frames = 15_400
    logger.log_metrics({"train/return": 2.5}, step=8)
    logger.finish("FINISHED")
    run = client.get_run(logger.run_id())
    assert history(client, logger.run_id(), "train/return") == [(15_360, 1.5), (15_400, 2.5)]
    assert set(run.data.metrics) == {"train/return", "odd_name_"}
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "frames"


def test_without_a_clock_metrics_lie_over_the_given_step(root, client):
    logger = MLflowLogger(root, "exp", "steps")
    logger.log_metrics({"a": 1.0}, step=8)
    logger.finish("FINISHED")
    assert history(client, logger.run_id(), "a") == [(8, 1.0)]


def test_metrics_that_are_not_finite_are_kept(root, client):
    logger = MLflowLogger(root, "exp", "nan")
    logger.log_metrics({"loss": math.nan, "grad": math.inf}, step=1)
    logger.finish("FAILED")
    metrics = client.get_run(logger.run_id()).data.metrics
    assert math.isnan(metrics["loss"])
    assert metrics["grad"] > 1e300


def test_a_run_is_continued_and_its_first_parameters_stay(root, client):
    first = MLflowLogger(root, "exp", "again", tags={"paper": "2309.14970"}, parent="abc")
    first.log_hyperparams({"model": {"lr": 0.1, "gamma": 0.9}, "long": "x" * 10_000})
    first.log_metrics({"a": 1.0}, 1)
    first.finish("FAILED")
    second = MLflowLogger(root, "exp", "again", run_id=first.run_id())
    second.open()
    second.log_hyperparams({"model": {"lr": 0.2, "gamma": 0.9, "new": 1}})
    second.flush()
    assert client.get_run(first.run_id()).info.status == "RUNNING"
    second.log_metrics({"a": 2.0}, 2)
    second.finish("FINISHED")
    run = client.get_run(first.run_id())
    assert second.run_id() == first.run_id()
    assert history(client, first.run_id(), "a") == [(1, 1.0), (2, 2.0)]
    assert run.data.params["model.lr"] == "0.1"
    assert run.data.params["model.new"] == "1"
    assert run.data.tags["changed:model.lr"] == "0.2"
    assert "changed:model.gamma" not in run.data.tags
    assert (run.data.tags["paper"], run.data.tags["mlflow.parentRunId"]) == ("2309.14970", "abc")
    assert run.info.status == "FINISHED"


def test_artifacts_lie_under_the_root(root, tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"weights")
    logger = MLflowLogger(root, "exp", "artifacts")
    logger.log_text("frames: 1", "recipe.yaml")
    logger.log_artifact(tmp_path / "last.ckpt", "checkpoints")
    logger.finish("FINISHED")
    folder = root / "artifacts" / "exp" / logger.run_id() / "artifacts"
    assert (folder / "recipe.yaml").read_text() == "frames: 1"
    assert (folder / "checkpoints" / "last.ckpt").read_bytes() == b"weights"


def test_a_deleted_experiment_comes_back(root, client):
    experiment = client.create_experiment("gone")
    client.delete_experiment(experiment)
    logger = MLflowLogger(root, "gone", "run")
    logger.finish("FINISHED")
    assert client.get_run(logger.run_id()).info.experiment_id == experiment


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_lightning_ends_a_run_with_the_right_status(root, client, tmp_path, error, status):
    class Model(BoringModel):
        def training_step(self, batch, batch_idx):
            if error is not None:
                raise error("stop")
            return super().training_step(batch, batch_idx)

    logger = MLflowLogger(root, "exp", f"ends-{status}")
    logger.open()
    logger.begin()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(logger=logger, max_steps=1, limit_val_batches=0, default_root_dir=tmp_path, **quiet)
    if error is None:
        trainer.fit(Model())
    else:
        with pytest.raises((ValueError, SystemExit)):
            trainer.fit(Model())
    assert client.get_run(logger.run_id()).info.status == status


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("error", [RecipeError, ZeroDivisionError])
def test_what_fails_before_training_begins_is_not_recorded(root, client, tmp_path, begun, error):
    class Model(BoringModel):
        def configure_model(self):
            if begun:
                self.logger.begin()
            raise error("model.lr is 0; it must be positive")

    logger = MLflowLogger(root, "exp", f"refused-{begun}-{error.__name__}")
    logger.open()
    logger.log_hyperparams({"a": 1})
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    with pytest.raises(error):
        Trainer(logger=logger, max_steps=1, default_root_dir=tmp_path, **quiet).fit(Model())
    (experiment,) = client.search_experiments(filter_string="name = 'exp'")
    runs = client.search_runs([experiment.experiment_id], f"tags.`mlflow.runName` = '{logger.run_name}'")
    assert [run.info.status for run in runs] == (["FAILED"] if begun else [])


def test_the_first_bad_verdict_stays_and_a_good_one_does_not(root, client):
    logger = MLflowLogger(root, "exp", "verdict")
    logger.open()
    for status, there in (("FINISHED", "FINISHED"), ("KILLED", "KILLED"), ("FINISHED", "KILLED"), ("FAILED", "KILLED")):
        logger.finish(status)
        assert client.get_run(logger.run_id()).info.status == there


def test_metrics_that_failed_are_sent_once_it_works_again(root, client, refusing, monkeypatch):
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.05)
    logger = MLflowLogger(root, "exp", "heals")
    assert logger.run_id()
    refusing(False)
    with pytest.warns(UserWarning, match="refused; training goes on") as warned:  # noqa: PT031
        for step in range(5):
            started = time.perf_counter()
            logger.log_metrics({"a": float(step)}, step)
            assert time.perf_counter() - started < 0.1
        logger.flush()
    assert len(warned) == 1
    assert history(client, logger.run_id(), "a") == []
    refusing(True)
    time.sleep(0.1)
    logger.log_metrics({"a": 5.0}, 5)
    logger.flush()
    assert history(client, logger.run_id(), "a") == [(step, float(step)) for step in range(6)]
    logger.finish("FINISHED")
    journal = root / "exp" / "heals" / "metrics.jsonl"
    assert journal.with_name("metrics.sent").read_text() == str(journal.stat().st_size)


@pytest.mark.filterwarnings("default:.*training goes on, sent later.*")
def test_metrics_that_cannot_be_sent_are_sent_when_the_run_is_continued(root, client, refusing, monkeypatch):
    monkeypatch.setattr(tracking, "END_SECONDS", 0.1)
    logger = MLflowLogger(root, "exp", "lost")
    assert logger.run_id()
    refusing(False)
    with pytest.warns(UserWarning, match=r"from frame 0 on .*metrics\.jsonl.*--ckpt_path last"):  # noqa: PT031
        for step in range(3):
            logger.log_metrics({"a": float(step)}, step)
        logger.finish("FAILED")
    rows = [json.loads(line) for line in (root / "exp" / "lost" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["metrics"]) for row in rows] == [(step, {"a": float(step)}) for step in range(3)]
    assert client.get_run(logger.run_id()).info.status == "FAILED"
    refusing(True)
    again = MLflowLogger(root, "exp", "lost", run_id=logger.run_id(), frames=1)
    again.begin()
    again.finish("FINISHED")
    assert history(client, logger.run_id(), "a") == [(0, 0.0), (1, 1.0)]  # what comes after frame 1 is trained again


def test_what_was_logged_after_the_checkpoint_is_logged_again_and_counts_once(root):
    first = MLflowLogger(root, "exp", "cut")
    for step in range(4):
        first.log_metrics({"a": float(step)}, step)
    first.finish("FAILED")
    journal = root / "exp" / "cut" / "metrics.jsonl"
    with journal.open("a") as file:
        file.write('{"step": 4, "timest')  # what a kill leaves
    again = MLflowLogger(root, "exp", "cut", run_id=first.run_id(), frames=1)
    again.begin()
    for step in range(2, 6):
        again.log_metrics({"a": float(step)}, step)
    again.finish("FINISHED")
    assert [json.loads(line)["step"] for line in journal.read_text().splitlines()] == list(range(6))


def test_a_run_that_the_database_has_lost_is_recorded_anew_with_all_its_metrics(root, tmp_path):
    first = MLflowLogger(root, "exp", "r")
    for step in range(3):
        first.log_metrics({"a": float(step)}, step)
    first.finish("FAILED")
    shutil.copytree(root / "exp" / "r", tmp_path / "exp" / "r")  # and no database
    again = MLflowLogger(tmp_path, "exp", "r", run_id=first.run_id(), frames=2)
    again.begin()
    again.log_metrics({"a": 3.0}, 3)
    again.finish("FINISHED")
    assert again.run_id() != first.run_id()
    found = history(MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"), again.run_id(), "a")
    assert found == [(step, float(step)) for step in range(4)]


def test_a_moved_root_keeps_its_files_and_the_copied_folder_of_a_run_is_another_run(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    process = start(before, "r", "finish")  # MLflow remembers within a process where files are
    run_id = process.communicate(timeout=240)[0].strip()
    before.rename(after)
    again = MLflowLogger(after, "both", "r", run_id=run_id, frames=1)
    again.log_text("2", "second.txt")
    again.finish("FINISHED")
    client = connect(after)
    assert {file.path for file in client.list_artifacts(run_id)} == {"late.txt", "second.txt"}
    assert not before.exists()
    shutil.copytree(after / "both" / "r", after / "both" / "copy")
    copy = MLflowLogger(after, "both", "copy", run_id=run_id, frames=1)
    copy.log_text("3", "third.txt")
    copy.finish("FINISHED")
    assert copy.run_id() != run_id
    assert [file.path for file in client.list_artifacts(copy.run_id())] == ["third.txt"]


def test_a_metric_that_is_refused_holds_back_no_other(root, client):
    logger = MLflowLogger(root, "exp", "refused")
    logger.begin()
    journal = root / "exp" / "refused" / "metrics.jsonl"
    with journal.open("a") as file:  # a name of which nothing here knows that MLflow refuses it
        file.write(json.dumps({"step": 1, "timestamp": 1, "metrics": {"b": 1.0, "what?": 2.0, "c": 3.0}}) + "\n")
    with pytest.warns(UserWarning, match=r"does not take the metric 'what\?'"):  # noqa: PT031
        logger.log_metrics({"a": 1.0}, 2)
        logger.finish("FINISHED")
    assert client.get_run(logger.run_id()).data.metrics == {"a": 1.0, "b": 1.0, "c": 3.0}


@given(st.text(max_size=400))
@settings(max_examples=200, deadline=None)
@example("a//b").via("field trial")
@example("loss/").via("field trial")
@example("../..").via("a path")
def test_every_metric_gets_a_name_that_mlflow_takes(name):
    _validate_metric_name(metric_name(name))
    assert 0 < len(metric_name(name)) <= 250


def test_values_tags_and_names_that_are_long_stay_apart_and_drop_nothing(root, client):
    long, other = ["x" * 20] * 400, [*["x" * 20] * 399, "y" * 20]
    ids = []
    for name, value in (("long", long), ("other", other)):
        logger = MLflowLogger(root, "exp", name, tags={"variant": "v" * 9000, "last": "1"})
        logger.open()
        logger.log_hyperparams({"list": value, "k" * 300: 1, "z": 2})
        logger.finish("FINISHED")
        ids.append(logger.run_id())
    again = MLflowLogger(root, "exp", "long", run_id=ids[0], frames=0)
    again.open()
    again.log_hyperparams({"k" * 300: 2, "z": 3})
    again.finish("FINISHED")
    first, second = (client.get_run(run_id).data for run_id in ids)
    assert first.params["list"] != second.params["list"]
    assert len(first.params) == 3
    assert (first.tags["last"], first.tags["changed:z"]) == ("1", "3")
    assert sum(key.startswith("changed:k") for key in first.tags) == 1


def test_a_run_in_whose_folder_nobody_writes_any_more_is_not_running(root, client):
    experiment = client.create_experiment("dead")
    made = {}
    for name in ("dead", "alive", "elsewhere"):
        tags = {"folder": f"dead/{name}"}
        made[name] = client.create_run(experiment, run_name=name, tags=tags).info.run_id
    Root(root).run("dead", "dead").claim().release()
    lock = Root(root).run("dead", "alive").claim()
    close_abandoned(client, root, experiment)
    lock.release()
    found = {name: client.get_run(run_id).info.status for name, run_id in made.items()}
    assert found == {"dead": "KILLED", "alive": "RUNNING", "elsewhere": "RUNNING"}


def test_a_run_says_what_it_is_what_came_of_it_and_how_it_is_run_again(root, client):
    tags = {
        "method": "PPO",
        "environment": "CartPole",
        "seed": "3",
        "variant": "",
        "command": "lightning-hyper fit -c x",
    }
    logger = MLflowLogger(root, "exp", "described", tags=tags)
    logger.begin()
    logger.log_hyperparams({"weights": None, "lr": 1})
    for step, value in ((10, 1.0), (20, 30.0), (30, math.nan), (40, 2.5)):
        logger.log_metrics({"eval/return": value}, step)
    logger.finish("FINISHED")
    data = client.get_run(logger.run_id()).data
    assert data.tags["mlflow.note.content"].split("\n\n") == [
        "**PPO on CartPole**, seed 3.",
        "Final return 2.50 at 40 frames, best 30.00.",
        "```\nlightning-hyper fit -c x\n```",
    ]
    assert data.metrics["eval/best_return"] == 30.0
    assert data.params == {"lr": "1"}
    assert "variant" not in data.tags


def test_an_address_shows_no_password():
    shown = without_password("http://ann:secret@host:5000/x and postgresql://bob:pa:ss@db/mlflow, sqlite:////a@b/c")
    assert shown == "http://ann:***@host:5000/x and postgresql://bob:***@db/mlflow, sqlite:////a@b/c"


def test_a_locked_database_is_an_error_in_time(root, monkeypatch):
    monkeypatch.setattr("lightning_hyper.tracking.LOCK_SECONDS", 0.2)
    other = sqlite3.connect(root / "mlflow.db")
    other.execute("BEGIN EXCLUSIVE")
    started = time.perf_counter()
    with pytest.raises(TrackingError, match=r"root: .*mlflow\.db.*locked"):
        MLflowLogger(root, "exp", "locked").open()
    assert time.perf_counter() - started < 2
    other.rollback()
    other.close()


def test_a_root_that_is_no_folder_is_an_error(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(TrackingError, match=r"root: .*another root"):
        MLflowLogger(tmp_path / "runs").open()


def test_a_corrupt_database_is_an_error(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(TrackingError, match=r"root: .*not a database"):
        MLflowLogger(tmp_path).open()


def test_a_database_of_something_else_is_an_error_and_left_alone(tmp_path):
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        connection.execute("CREATE TABLE cats (name TEXT)")
    connection.close()
    before = (tmp_path / "mlflow.db").read_bytes()
    with pytest.raises(TrackingError, match=r"root: .*other than MLflow"):
        MLflowLogger(tmp_path).open()
    assert (tmp_path / "mlflow.db").read_bytes() == before


def test_a_server_that_does_not_answer_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=r"tracking_uri: .*127\.0\.0\.1:9"):
        MLflowLogger(tmp_path, tracking_uri="http://127.0.0.1:9").run_id()


RUN = """
import sys
from lightning_hyper.training.mlflow import MLflowLogger
logger = MLflowLogger(sys.argv[1], "both", sys.argv[2])
print(logger.run_id(), flush=True)
logger.log_metrics({"a": 1.0}, 1)
if "finish" in sys.argv:
    logger.finish("FINISHED")
    logger.log_text("late", "late.txt")
"""


def start(*arguments):
    return subprocess.Popen([sys.executable, "-c", RUN, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def test_two_processes_may_create_one_database_at_once(tmp_path):
    processes = [start(tmp_path, "one", "finish"), start(tmp_path, "two")]
    ids = [process.communicate(timeout=240)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = [client.get_run(run_id) for run_id in ids]
    assert runs[0].info.experiment_id == runs[1].info.experiment_id
    assert [run.data.metrics for run in runs] == [{"a": 1.0}] * 2
    # What is logged after the end gets there before Python leaves, and a run that nobody ended has failed.
    assert (tmp_path / "artifacts" / "both" / ids[0] / "artifacts" / "late.txt").read_text() == "late"
    assert [run.info.status for run in runs] == ["FINISHED", "FAILED"]


def test_a_creation_cut_short_by_a_kill_leaves_no_half_database(tmp_path):
    process = start(tmp_path, "killed")
    while not (tmp_path / "mlflow.db.part").exists() or (tmp_path / "mlflow.db.part").stat().st_size == 0:
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)
    process.kill()
    process.communicate()
    again = MLflowLogger(tmp_path, "both", "again")
    assert again.run_id()
    again.finish("FINISHED")


def test_other_ranks_do_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.rank_zero_only, "rank", 1)
    logger = MLflowLogger(tmp_path / "runs")
    logger.open()
    logger.log_metrics({"a": 1.0}, 1)
    logger.finish("FINISHED")
    assert logger.run_id() is logger.version is None
    assert not (tmp_path / "runs").exists()


def test_the_commit_has_a_plus_where_files_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() == ""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert git_commit() == head
    (tmp_path / "file").write_text("2")
    assert git_commit() == head + "+"
    monkeypatch.setenv("PATH", os.devnull)
    assert git_commit() == ""


def test_hardware_says_the_cores_or_the_gpu():
    assert "core" in hardware() or "NVIDIA" in hardware()
