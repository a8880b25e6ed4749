"""Every shipped recipe parses and trains two batches; the wheel ships them."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lightning_hyper import recipes
from lightning_hyper.experiment import main

NAMES = [row.name for row in recipes.listing()]


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains_two_batches(name, tmp_path):
    given = recipes.resolve([name])
    data = given["data"]["init_args"]
    together = data["env"]["init_args"]["num_envs"] * data.get("steps", 60)
    options = ["--frames", str(2 * together), "--data.init_args.eval_envs", "4", "--run", "r", "--video", "0"]
    if given["data"]["class_path"] == "EpisodeRollouts":  # two short batches, whatever the number of tasks
        options = ["--data.init_args.env.init_args.num_envs", "24", "--data.init_args.steps", "20"]
        options += ["--data.init_args.eval_envs", "20", "--model.init_args.minibatches", "2"]
        options += ["--frames", "960", "--run", "r", "--trainer.limit_val_batches", "0"]  # whose episodes are long
    if given["data"]["class_path"] == "Replay":  # two updates, short evaluations
        options += ["--data.init_args.warmup_frames", str(together)]
        options += ["--data.init_args.updates_per_frame", str(2 / together)]
        options += ["--data.init_args.env.init_args.episode_steps", "20"]
        if "trunk" in given["model"]["init_args"]["critic"]["init_args"]:  # whose full size tests/modules checks
            options += ["--model.init_args.critic.init_args.trunk.init_args.widths", "[16, 16]"]
    assert main(["fit", "-c", name, "--root", str(tmp_path), *options]) == 0
    assert (tmp_path / given["experiment"] / "r" / "finished.json").exists()


@pytest.mark.parametrize("name", NAMES)
def test_recipe_says_what_it_is(name):
    given = recipes.resolve([name])
    assert {"paper", "method", "environment", "experiment"} <= given.keys()
    assert f"lightning-hyper fit -c {name} " in recipes.show(name)


def test_wheel_in_an_empty_folder_runs_a_shipped_recipe(tmp_path):
    """The installed wheel alone, without the checkout: dependencies come from this environment."""
    checkout, site, work = Path(__file__).parents[2], tmp_path / "site", tmp_path / "work"
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(checkout)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    work.mkdir()
    code = (
        "import sys, lightning_hyper; from lightning_hyper.cli import main;"
        f"assert lightning_hyper.__file__.startswith({str(site)!r}), lightning_hyper.__file__;"
        "sys.exit(main(['fit', '-c', 'recurrent/gridnavi_rnn_hn', '--frames', '15360']))"
    )
    environment = {"PYTHONPATH": str(site), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (work / "runs/gridnavi/gridnavi_rnn_hn-seed0/finished.json").exists()
