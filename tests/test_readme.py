"""What the README shows works as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```(?:\w*)\n(.*?)^```", README, re.M | re.S)
FILES = {match[1]: block for block in BLOCKS if (match := re.match(r"# (\w+\.(?:py|yaml))\n", block))}
SMALL = ("--frames", "2048", "--data.evaluate_every", "null", "--data.eval_envs", "2", "--trainer.callbacks", "null")


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The README's files, in the folder that one works in; gives a way to run the command there."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(*arguments):
        command = [sys.executable, "-m", "lightning_hyper", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


def test_the_files_are_found():
    assert set(FILES) == {"pendulums.yaml", "remembers.yaml", "my_parts.py", "mine.yaml"}


@pytest.mark.parametrize("recipe", ["pendulums", "remembers"])
def test_its_recipes_train(written, recipe):
    written("fit", "-c", f"{recipe}.yaml", "--run", "r", *SMALL)


def test_a_users_own_parts_train_are_evaluated_and_act(written):
    written("fit", "-c", "mine.yaml", "--experiment", "e", "--run", "r", *SMALL)
    last = "runs/e/r/checkpoints/last.ckpt"
    assert "test/return" in written("test", "--ckpt_path", last, "-c", "mine.yaml", *SMALL)

    import lightning_hyper

    with pytest.raises(ValueError, match="my_parts"):
        lightning_hyper.load(last)
    agent = lightning_hyper.load(last, trust=["my_parts"])
    env = gymnasium.make("my_parts:Corridor-v0")
    before = np.random.get_state()[1].copy()
    observation, _ = env.reset(seed=0)
    agent.reset()
    over, reward, steps = False, 0.0, 0
    while not over:
        observation, reward, terminated, truncated, _ = env.step(agent.act(observation, reward))
        over, steps = terminated or truncated, steps + 1
    assert 2 <= steps <= 20
    assert (np.random.get_state()[1] == before).all()


def test_the_commands_that_it_shows_name_what_there_is():
    from lightning_hyper.recipes import resolve

    shown = [line for block in BLOCKS for line in block.splitlines() if line.startswith("lightning-hyper fit")]
    assert len(shown) >= 7
    for line in shown:
        names = re.findall(r"-c (\S+)", line)
        assert resolve(names)["model"]
