"""Bad recipes and commands are refused before training, in one line that names the key; faults lose nothing."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient

from lightning_hyper.algorithms import PPO
from lightning_hyper.checks import RecipeError
from lightning_hyper.parts import instantiate_model, sentence

TINY, TINY_TD3, TINY_RETRIEVAL = (Path(__file__).parent / f"tiny{name}.yaml" for name in ("", "_td3", "_retrieval"))


@pytest.fixture
def run_status():
    def status():
        client = MlflowClient(f"sqlite:///{Path('runs/mlflow.db').resolve()}")
        runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
        return {run.info.run_name: run.info.status for run in runs}

    return status


@pytest.fixture
def resolved(tiny, capfd):
    """The recipe as `--print_config` shows it."""

    def show(*arguments, recipe=TINY):
        with pytest.raises(SystemExit) as end:
            tiny("fit", *arguments, "--print_config", recipe=recipe)
        assert end.value.code == 0
        return yaml.safe_load(capfd.readouterr().out)

    return show


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.minibatches", "5"], "model.minibatches is 5"),
        (["--model.epochs", "0"], "model.epochs is 0"),
        (["--data.env.env.size", "2"], "data.env.env.size is 2"),
        (["--data.evaluate_every", "0"], "data.evaluate_every is 0"),
        (["--checkpoint.every", "0"], "checkpoint.every is 0"),
        (["--frames", "0"], "frames is 0"),
        (["--model.actor.init", "magic"], "model.actor.init is 'magic'"),
        (["--trainer.precision", "16-mixed"], "trainer.precision is '16-mixed'"),
        (["--ckpt_path", "last"], "ckpt_path: there is no last.ckpt of a run 'tiny-seed0' in runs/tiny"),
        (["--ckpt_path", "nowhere.ckpt"], "ckpt_path: there is no file nowhere.ckpt"),
        (["--ckpt_path"], "--ckpt_path: expected one argument"),
        (["--model.hiden", "5"], "model.hiden: PPO takes no such argument"),
        (["--model.epochs", "many"], "model.epochs is 'many'; it must be a whole number"),
        (["--model.actor", "Hypr"], "model.actor: there is no class 'Hypr'; did you mean Hyper?"),
        (["--model", "PPOO"], "model: there is no class 'PPOO'; did you mean PPO?"),
        (["--data.env.env.num_envs", "x"], "data.env.env.num_envs is 'x'; it must be a whole number"),
        (["--trainer.foo", "5"], "trainer.foo: Trainer takes no such argument"),
        (["--trainer.callbacks+=Gone"], "error: trainer.callbacks.0: there is no class 'Gone'"),
        (["--trainer.devices", "many"], "trainer.devices is 'many': `devices` selected with"),
        (["--data.eval_mode", "best"], "data.eval_mode is 'best'; it must be one of deterministic, sampled"),
        (["--model", "null"], "error: model is null; it must name a class, a kind of Algorithm"),
        (["--model", "5"], "error: model is 5; it must name a class, a kind of Algorithm"),
        (["--framez", "5"], "--framez: a recipe has no key 'framez'; did you mean --frames?"),
        (["--seed_everything", "3"], "--seed_everything: a recipe has no key 'seed_everything'"),
    ],
)
def test_impossible_recipes_name_the_key_in_one_line_and_leave_nothing(tiny, capfd, arguments, said):
    assert tiny("fit", *arguments) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith("lightning-hyper fit: error: ")
    assert said in line
    assert len(line) < 300
    assert "; or " not in line
    assert not list(Path("runs").rglob("*"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data.env", "GridNavi"], "data.env"),
        (["--data.capacity", "5"], "data.capacity is 5"),
        (["--data.capacity", "19"], "data.capacity is 19"),
        (["--data.warmup_frames", "320"], "data.warmup_frames is 320"),
        (["--data.prioritized", "[0.6]"], "data.prioritized is [0.6]"),
        (["--model.policy_delay", "0"], "model.policy_delay is 0"),
        (["--data.env.episode_steps", "0"], "episode_steps is 0"),
    ],
)
def test_bad_values_of_replayed_recipes_are_named(tiny, capfd, arguments, said):
    assert tiny("fit", *arguments, recipe=TINY_TD3) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert said in line
    assert len(line) < 300


def test_alternatives_of_the_parser_become_one_sentence():
    message = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'Algorithm'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'mine.PPO':
        Parser key "init_args.lr":
          Does not validate against any of the Union subtypes
          Errors:
            - Expected a <class 'float'>. Got value: fast
            - Expected a <class 'int'>. Got value: fast
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>"""
    assert sentence(message) == "model.lr is 'fast'; it must be float; or model.lr is 'fast'; it must be int"
    assert sentence("something else\nentirely") == "something else; or entirely"


def test_options_reach_the_parser_as_the_recipes_own_values(resolved):
    before = resolved()["model"]["init_args"]
    after = resolved("--model.lr", "1e-5", "--model.context.encoder", "LSTM", "--model.context.encoder.hidden=3")
    changed = after["model"]["init_args"]
    assert changed.pop("lr") == 1e-5
    assert changed["context"]["init_args"].pop("encoder")["init_args"]["hidden"] == 3
    before.pop("lr")
    before["context"]["init_args"].pop("encoder")
    assert changed == before
    assert resolved("--trainer.callbacks+=LearningRateMonitor")["trainer"]["callbacks"][0]["class_path"].endswith(
        "LearningRateMonitor"
    )


def test_null_reaches_what_lies_below_a_factory(resolved):
    subset = "--model.retriever.subset"
    for arguments, value in (((subset, "7"), 7), ((subset, "7", f"{subset}=null"), None)):
        found = resolved(*arguments, recipe=TINY_RETRIEVAL)
        assert found["model"]["init_args"]["retriever"]["init_args"]["subset"] is value


@pytest.mark.parametrize("given", ["MLP", "{class_path: MLP}", "lightning_hyper.nn.MLP"])
def test_a_short_name_is_a_part_of_this_package_first(resolved, given):
    # torchrl has an MLP, too, and the argument takes any torch module
    found = resolved("--model.actor", "null", "--model.actor", given, "--method", "MLP")
    assert found["model"]["init_args"]["actor"]["class_path"] == "lightning_hyper.nn.MLP"
    assert found["method"] == "MLP"


def test_a_recipe_that_is_shown_is_the_same_recipe(resolved, tmp_path):
    found = resolved("--model.lr", "0.25")
    Path("shown.yaml").write_text(yaml.safe_dump(found))
    assert resolved(recipe="shown.yaml") == found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--help"], "--stop_at_return"), (["--model.help", "PPO"], "--model.minibatches"), (["-h"], "--data")],
)
def test_help_is_the_parsers(tiny, capfd, arguments, said):
    with pytest.raises(SystemExit) as end:
        tiny("fit", "--frames", "0", *arguments)
    assert end.value.code == 0
    assert said in capfd.readouterr().out


def test_help_on_an_unknown_class_is_a_fault(tiny, capfd):
    assert tiny("fit", "--model.help", "PPOO") == 2
    assert "error: model.help: there is no class 'PPOO'; did you mean PPO?" in capfd.readouterr().err


MINE = """
from lightning_hyper.envs import GridNavi
from lightning_hyper.nn import Concat

class Mine(Concat):
    pass

class Broken(Concat):
    def __init__(self, *args, **kwargs):
        raise ValueError("my own mistake")

class Late(GridNavi):
    def simulate(self, action):
        one, two = (1, 2, 3)
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine_of_this_test.py").write_text(MINE)
    yield "mine_of_this_test"
    sys.modules.pop("mine_of_this_test", None)


def test_a_class_of_ones_own_serves_as_ours_do(tiny, mine, resolved):
    assert tiny("fit", "--run", "a", "--model.actor", f"{mine}.Mine", "--frames", "320") == 0
    recipe = torch.load("runs/tiny/a/checkpoints/last.ckpt", weights_only=True)["recipe"]
    assert recipe["model"]["init_args"]["actor"]["class_path"] == f"{mine}.Mine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.actor", "{}.Broken"], "my own mistake"),
        (["--data.env.env", "{{class_path: {}.Late, init_args: {{num_envs: 16}}}}"], "too many values to unpack"),
    ],
)
def test_a_mistake_in_ones_own_class_keeps_its_traceback(tiny, mine, arguments, said):
    with pytest.raises(ValueError, match=said) as error:
        tiny("fit", *(argument.format(mine) for argument in arguments))
    assert not isinstance(error.value, RecipeError)
    assert error.traceback[-1].path.name == f"{mine}.py"


def test_a_mistake_ends_the_process_with_1_and_a_fault_with_2(tmp_path, mine):
    command = [sys.executable, "-m", "lightning_hyper", "fit", "-c", str(TINY), "--model.actor"]
    codes = {}
    for name in ("Broken", "Gone"):
        done = subprocess.run([*command, f"{mine}.{name}"], cwd=tmp_path, capture_output=True, text=True)
        codes[name] = (done.returncode, "Traceback" in done.stderr)
    assert codes == {"Broken": (1, True), "Gone": (2, False)}


def test_a_checkpoints_recipe_imports_nothing_foreign(tiny, mine, capfd):
    assert tiny("fit", "--run", "a", "--model.actor", f"{mine}.Mine", "--frames", "320") == 0
    last = "runs/tiny/a/checkpoints/last.ckpt"
    sys.modules.pop(mine)
    capfd.readouterr()
    assert tiny("validate", "--ckpt_path", last, recipe=None) == 2
    assert f"ckpt_path: the checkpoint's recipe names {mine}.Mine" in capfd.readouterr().err
    model = torch.load(last, weights_only=True)["recipe"]["model"]
    with pytest.raises(RecipeError, match=f"names {mine}.Mine"):
        instantiate_model(model)
    assert mine not in sys.modules
    assert isinstance(instantiate_model(model, trust=[mine]), PPO)
    assert tiny("validate", "--ckpt_path", last, "--model.actor", f"{mine}.Mine") == 0


def test_training_begins_with_the_weights_of_a_checkpoint(tiny, capfd):
    absent = ("--data.env.absent", "[MiniGrid-DistShift1-v0]")
    first, second = (f"runs/tiny/{run}/checkpoints/last.ckpt" for run in "ab")
    later = ("fit", "--weights", first, "--frames", "96")
    assert tiny("fit", "--run", "a", *absent, "--frames", "192", recipe=TINY_RETRIEVAL) == 0
    assert tiny(*later, "--run", "b", "--model.lr", "1e-30", recipe=TINY_RETRIEVAL) == 0
    there, here = (torch.load(path, weights_only=True) for path in (first, second))
    assert (there["frames"], here["frames"]) == (192, 96)
    for name, tensor in there["state_dict"].items():
        torch.testing.assert_close(here["state_dict"][name], tensor, rtol=0, atol=0)
    assert tiny(*later, "--run", "c", "--model.actor.hidden", "[5]", recipe=TINY_RETRIEVAL) == 2
    assert "weights: runs/tiny/a/checkpoints/last.ckpt is of another model" in capfd.readouterr().err
    assert tiny(*later, "--run", "d") == 2  # GridNavi
    assert "weights: runs/tiny/a/checkpoints/last.ckpt is for" in capfd.readouterr().err


def test_unknown_recipe_suggests_the_nearest(tiny, capfd):
    assert tiny("fit", recipe="recurrent/gridnavi_rnn_hm") == 2
    assert "recurrent/gridnavi_rnn_hn" in capfd.readouterr().err


def test_no_recipe_at_all(tiny, capfd):
    assert tiny("fit", recipe=None) == 2
    assert "no recipe" in capfd.readouterr().err


def test_several_layers_make_one_run_named_after_them(tiny, tmp_path):
    (tmp_path / "_short.yaml").write_text("frames: 160\nmethod: short")
    assert tiny("fit", "-c", "_short.yaml") == 0
    recipe = torch.load("runs/tiny/tiny-short-seed0/checkpoints/last.ckpt", weights_only=True)["recipe"]
    assert (recipe["frames"], recipe["method"]) == (160, "short")


def test_checkpoint_of_another_recipe_names_what_differs(tiny, capfd):
    assert tiny("fit", "--run", "a", "--frames", "320") == 0
    assert tiny("fit", "--run", "a", "--ckpt_path", "last", "--model.gamma", "0.5") == 2
    assert "model.init_args.gamma: 0.95 there, 0.5 here" in capfd.readouterr().err
    free = ("--data.evaluate_every", "160", "--data.eval_envs", "4", "--data.eval_mode", "sampled")
    assert tiny("fit", "--run", "a", "--ckpt_path", "last", *free, "--frames", "480") == 0


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
    update, calls = PPO.update, []

    def spoiled(self, loss, *arguments, **named):
        calls.append(loss)
        # 2 epochs x 4 minibatches x 2 batches come before the first evaluation
        return {
            **update(self, loss, *arguments, **named),
            "total": loss.detach() * (float("nan") if len(calls) == 19 else 1),
        }

    monkeypatch.setattr(PPO, "update", spoiled)
    assert tiny("fit", "--run", "a") == 1
    assert "total is nan in update 3 of 8 on the batch that ends at frame 480" in capfd.readouterr().err
    good = torch.load("runs/tiny/a/checkpoints/last.ckpt", weights_only=True)
    assert good["frames"] == 320
    assert all(v.isfinite().all() for v in good["state_dict"].values())
    assert run_status() == {"a": "FAILED"}


def test_a_crash_marks_the_run_failed(tiny, monkeypatch, run_status):
    def crash(self, batch):
        raise RuntimeError("boom")

    monkeypatch.setattr(PPO, "learn", crash)
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
    assert {"mlflow.db", "tiny/a/checkpoints/last.ckpt", "tiny/a/finished.json"} <= names
    summary = json.loads(Path("elsewhere/tiny/a/finished.json").read_text())
    assert (summary["frames"], summary["budget"]) == (320, 320)
    assert "eval/return" in summary


def test_checkpoints_to_keep_are_named_by_frame(tiny):
    assert tiny("fit", "--run", "a", "--frames", "960", "--checkpoint.every", "640") == 0
    kept = {p.name for p in Path("runs/tiny/a/checkpoints").iterdir()}
    assert kept == {"last.ckpt", "best.ckpt", "frames=640.ckpt"}


def test_training_stops_at_a_wanted_return(tiny):
    assert tiny("fit", "--run", "a", "--stop_at_return", "-1000") == 0
    assert torch.load("runs/tiny/a/checkpoints/last.ckpt", weights_only=True)["frames"] == 320


def test_a_run_says_what_is_of_use_and_no_more(tmp_path):
    """No warning and no hint of another package in a whole run, and none when it goes on."""
    command = [sys.executable, "-W", "default", "-m", "lightning_hyper", "fit", "-c", str(TINY), "--run", "a"]
    said = []
    for more in (["--frames", "320"], ["--frames", "640", "--ckpt_path", "last"]):
        done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0
        said += done.stderr.splitlines()
    # MLflow's database warns of itself, in two lines.
    ours = [line for line in said if "sqlalchemy" not in line]
    restored = [f"{word} the checkpoint" for word in ("Restoring states from", "Restored all states from")]
    assert [line.partition(": float32")[0].partition(" path")[0].partition(" at")[0] for line in ours] == [
        "matmul",
        *restored,
        "matmul",
    ]


def test_a_metric_is_logged_for_the_batches_that_have_it_alone(tiny, monkeypatch):
    counted = iter(range(100))

    def every_other(*_, **__):
        return {"train/return": torch.tensor(1.0)} if next(counted) % 2 else {}

    monkeypatch.setattr("lightning_hyper.algorithms.base.episode_metrics", every_other)
    assert tiny("fit", "--run", "a", "--trainer.log_every_n_steps", "1", "--frames", "960") == 0
    rows = [json.loads(line) for line in Path("runs/tiny/a/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss/total" in row["metrics"]] == [160, 320, 480, 640, 800, 960]
    assert [row["step"] for row in rows if "train/return" in row["metrics"]] == [320, 640, 960]


@pytest.mark.parametrize("recipe", [TINY, TINY_TD3])
def test_bf16_mixed_trains(tiny, recipe):
    assert tiny("fit", "--run", "a", "--frames", "320", "--trainer.precision", "bf16-mixed", recipe=recipe) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [TINY, TINY_TD3])
def test_trains_and_resumes_on_a_gpu(tiny, recipe):
    gpu = ("--trainer.accelerator", "gpu", "--run", "a")
    assert tiny("fit", *gpu, "--frames", "640", recipe=recipe) == 0
    assert tiny("fit", *gpu, "--frames", "1280", "--ckpt_path", "last", recipe=recipe) == 0
