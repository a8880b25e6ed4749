"""Bad recipes and commands are refused before training, in one line that names the key; faults lose nothing."""

import sqlite3
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from lightning_hyper.modules import MetaAgent

TINY, TINY_TD3 = (Path(__file__).parent / name for name in ("tiny.yaml", "tiny_td3.yaml"))


@pytest.fixture
def run_status():
    def status():
        client = MlflowClient(f"sqlite:///{Path('runs/mlflow.db').resolve()}")
        runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
        return {run.info.run_name: run.info.status for run in runs}

    return status


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.init_args.minibatches", "5"], "model.minibatches is 5"),
        (["--model.init_args.bptt", "11"], "model.bptt is 11"),
        (["--data.init_args.env.init_args.size", "2"], "size is 2"),
        (["--data.init_args.batches_per_epoch", "0"], "data.batches_per_epoch is 0"),
        (["--frames", "0"], "frames is 0"),
        (["--model.init_args.actor.init_args.init", "magic"], "init is 'magic'"),
        (["--trainer.precision", "16-mixed"], "trainer.precision"),
        (["--ckpt_path", "last"], "ckpt_path: there is no last.ckpt"),
        (["--ckpt_path", "nowhere.ckpt"], "ckpt_path: there is no file nowhere.ckpt"),
    ],
)
def test_impossible_recipes_name_the_key(tiny, capfd, arguments, said):
    assert tiny("fit", *arguments) == 2
    assert said in capfd.readouterr().err
    assert not list(Path("runs").glob("tiny/*/checkpoints"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data.init_args.env", "GridNavi"], "data.env: GridNavi steps trials"),
        (["--data.init_args.capacity", "5"], "data.capacity is 5, less than data.batch_size 8"),
        (["--data.init_args.capacity", "19"], "data.capacity is 19, less than the 20 frames"),
        (["--data.init_args.warmup_frames", "320"], "data.warmup_frames is 320 and frames only 320"),
        (["--data.init_args.prioritized", "[0.6]"], "data.prioritized is [0.6]"),
        (["--model.init_args.policy_delay", "0"], "model.policy_delay is 0"),
        (["--data.init_args.env.init_args.episode_steps", "0"], "episode_steps is 0"),
        (["--video", "-1"], "video is -1"),
    ],
)
def test_bad_values_of_replayed_recipes_are_named(tiny, capfd, arguments, said):
    assert tiny("fit", *arguments, recipe=TINY_TD3) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert said in line
    assert len(line) < 300


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.init_args.hiden", "5"], "hiden"),
        (["--model.init_args.epochs", "many"], "epochs"),
        (["--model.init_args.actor", "Hypr"], "Hypr"),
        (["--framez", "5"], "framez"),
    ],
)
def test_unknown_keys_classes_and_wrong_types_are_named(tiny, capfd, arguments, said):
    assert tiny("fit", *arguments) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert said in line
    assert len(line) < 500


def test_null_reaches_what_lies_below_a_factory(tiny):
    subset = "--model.init_args.retriever.init_args.subset"
    retrieval = Path(__file__).parent / "tiny_retrieval.yaml"
    assert tiny("fit", "--run", "a", subset, "7", f"{subset}=null", "--frames", "192", recipe=retrieval) == 0
    recipe = torch.load("runs/tiny/a/checkpoints/last.ckpt", weights_only=True)["recipe"]
    assert recipe["model"]["init_args"]["retriever"]["init_args"]["subset"] is None


def test_training_begins_with_the_weights_of_a_checkpoint(tiny, capfd):
    retrieval = Path(__file__).parent / "tiny_retrieval.yaml"
    absent = ("--data.init_args.env.init_args.absent", "[MiniGrid-DistShift1-v0]")
    first, second = (f"runs/tiny/{run}/checkpoints/last.ckpt" for run in "ab")
    later = ("fit", "--weights", first, "--frames", "96")
    assert tiny("fit", "--run", "a", *absent, "--frames", "192", recipe=retrieval) == 0
    assert tiny(*later, "--run", "b", "--model.init_args.lr", "1e-30", recipe=retrieval) == 0
    there, here = (torch.load(path, weights_only=True) for path in (first, second))
    assert (there["frames"], here["frames"]) == (192, 96)
    for name, tensor in there["state_dict"].items():
        torch.testing.assert_close(here["state_dict"][name], tensor, rtol=0, atol=0)
    assert tiny(*later, "--run", "c", "--model.init_args.actor.init_args.hidden", "[5]", recipe=retrieval) == 2
    assert "weights: runs/tiny/a/checkpoints/last.ckpt is of another model" in capfd.readouterr().err
    assert tiny(*later, "--run", "d") == 2  # GridNavi
    assert "weights: runs/tiny/a/checkpoints/last.ckpt is for" in capfd.readouterr().err


def test_unknown_recipe_suggests_the_nearest(tiny, capfd):
    assert tiny("fit", recipe="recurrent/gridnavi_rnn_hm") == 2
    assert "recurrent/gridnavi_rnn_hn" in capfd.readouterr().err


def test_no_recipe_at_all(tiny, capfd):
    assert tiny("fit", recipe=None) == 2
    assert "no recipe" in capfd.readouterr().err


def test_checkpoint_of_another_recipe_names_what_differs(tiny, capfd):
    assert tiny("fit", "--run", "a", "--frames", "320") == 0
    assert tiny("fit", "--run", "a", "--ckpt_path", "last", "--model.init_args.lr", "0.5") == 2
    assert "model.init_args.lr: 0.001 there, 0.5 here" in capfd.readouterr().err


def test_truncated_checkpoint_is_refused_and_the_best_one_still_serves(tiny, capfd):
    assert tiny("fit", "--run", "a", "--frames", "320") == 0
    last = Path("runs/tiny/a/checkpoints/last.ckpt")
    last.write_bytes(last.read_bytes()[:1000])
    assert tiny("fit", "--run", "a", "--ckpt_path", "last") == 2
    assert "truncated" in capfd.readouterr().err
    assert tiny("fit", "--run", "a", "--ckpt_path", "best", "--frames", "640") == 0


def test_an_existing_run_is_not_overwritten(tiny, capfd):
    assert tiny("fit", "--run", "a", "--frames", "320") == 0
    assert tiny("fit", "--run", "a", "--frames", "320") == 2
    assert "--ckpt_path last" in capfd.readouterr().err


def test_runs_without_a_name_are_numbered(tiny):
    for _ in range(2):
        assert tiny("fit", "--frames", "160") == 0
    assert {p.name for p in Path("runs/tiny").iterdir()} == {"tiny-seed0", "tiny-seed0-2"}


def test_nan_stops_with_the_place_and_keeps_the_last_good_checkpoint(tiny, capfd, monkeypatch, run_status):
    calls = []
    value = MetaAgent.value

    def spoiled(self, x, c):
        calls.append(torch.is_grad_enabled())
        # 2 epochs x 4 minibatches x 2 batches are the first epoch of training
        return value(self, x, c) * (float("nan") if sum(calls) == 16 + 3 else 1.0)

    monkeypatch.setattr(MetaAgent, "value", spoiled)
    assert tiny("fit", "--run", "a") == 1
    assert "total is nan in update 3 of 8 on the batch that ends at frame 480" in capfd.readouterr().err
    good = torch.load("runs/tiny/a/checkpoints/last.ckpt", weights_only=True)
    assert good["frames"] == 320
    assert all(v.isfinite().all() for v in good["state_dict"].values())
    assert run_status() == {"a": "FAILED"}


def test_a_crash_marks_the_run_failed(tiny, monkeypatch, run_status):
    def crash(self, batch):
        raise RuntimeError("boom")

    monkeypatch.setattr(MetaAgent, "observe", crash)
    with pytest.raises(RuntimeError, match="boom"):
        tiny("fit", "--run", "a")
    assert run_status() == {"a": "FAILED"}


def test_locked_database_is_an_error_before_training(tiny, capfd, monkeypatch):
    monkeypatch.setattr("lightning_hyper.tracking.LOCK_SECONDS", 0.2)
    Path("runs").mkdir()
    connection = sqlite3.connect("runs/mlflow.db")
    connection.execute("BEGIN EXCLUSIVE")
    assert tiny("fit") == 2
    assert "root: " in capfd.readouterr().err
    connection.close()
    assert not Path("runs/tiny").exists()


def test_validate_and_test_print_returns_and_take_the_recipe_from_the_checkpoint(tiny, capfd):
    assert tiny("fit", "--run", "a", "--frames", "320") == 0
    capfd.readouterr()
    for verb, prefix in (("validate", "eval"), ("test", "test")):
        assert tiny(verb, "--ckpt_path", "runs/tiny/a/checkpoints/last.ckpt", recipe=None) == 0
        out = capfd.readouterr().out
        assert out.count(f"{prefix}/return") == 1
        assert f"{prefix}/episode_2" in out


def test_everything_lies_under_the_root(tiny, tmp_path):
    assert tiny("fit", "--run", "a", "--root", "elsewhere", "--frames", "320") == 0
    assert {p.name for p in tmp_path.iterdir()} == {"elsewhere"}
    names = {str(p.relative_to("elsewhere")) for p in Path("elsewhere").rglob("*")}
    assert {
        "mlflow.db",
        "tiny/a/checkpoints/last.ckpt",
        "tiny/a/checkpoints/best.ckpt",
        "tiny/a/finished.json",
    } <= names
    assert any(name.endswith("artifacts/recipe.yaml") for name in names)


def test_checkpoints_to_keep_are_named_by_frame(tiny):
    assert tiny("fit", "--run", "a", "--frames", "960", "--checkpoint.every", "640") == 0
    kept = {p.name for p in Path("runs/tiny/a/checkpoints").iterdir()}
    assert kept == {"last.ckpt", "best.ckpt", "frames=640.ckpt"}


def test_training_stops_at_a_wanted_return(tiny):
    assert tiny("fit", "--run", "a", "--stop_at_return", "-1000") == 0
    assert torch.load("runs/tiny/a/checkpoints/last.ckpt", weights_only=True)["frames"] == 320


@pytest.mark.parametrize("recipe", [TINY, TINY_TD3])
def test_bf16_mixed_trains(tiny, recipe):
    assert tiny("fit", "--run", "a", "--frames", "320", "--trainer.precision", "bf16-mixed", recipe=recipe) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [TINY, TINY_TD3])
def test_trains_and_resumes_on_a_gpu(tiny, recipe):
    gpu = ("--trainer.accelerator", "gpu", "--run", "a")
    assert tiny("fit", *gpu, "--frames", "640", recipe=recipe) == 0
    assert tiny("fit", *gpu, "--frames", "1280", "--ckpt_path", "last", recipe=recipe) == 0
