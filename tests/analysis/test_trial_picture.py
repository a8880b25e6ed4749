"""The picture of a trial shows the way that was walked, and drawing it changes nothing."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient

from lightning_hyper.algorithms import PPO
from lightning_hyper.analysis import trial_picture
from lightning_hyper.analysis.trial_picture import TrialPicture, draw_telling_trial, draw_trial
from lightning_hyper.envs import GridNavi, Pendulum, Trials
from lightning_hyper.experience import Rollouts
from lightning_hyper.experiment import main


class Walk:
    """Up for two frames, then right, from the beginning of each episode."""

    def act(self, step, state):
        frame = int(step["step_count"][0]) % 5
        return {"action": torch.tensor([1 if frame < 2 else 2])}, state


def paths(figure):
    return [axes.lines[1].get_xydata() for axes in figure.axes]  # the goal is the first


@pytest.mark.parametrize("boundary", ["first", "last"])
def test_every_episode_is_drawn_from_the_start_to_its_last_cell(boundary):
    env = Trials(partial(GridNavi, 1, episode_steps=5), episodes=3, boundary=boundary)
    figure = draw_trial(Walk(), env)
    assert len(figure.axes) == 3
    for path in paths(figure):
        assert path.round().tolist() == [[0, 0], [0, 1], [0, 2], [1, 2], [2, 2], [3, 2]]
    goal = env.current["task"][0]
    hits = 1.0 * any((goal == torch.tensor(cell)).all() for cell in ([0, 2], [1, 2], [2, 2], [3, 2]))
    for axes in figure.axes:
        np.testing.assert_allclose(axes.lines[0].get_xydata()[0], goal)
        assert axes.get_title().endswith(f": {-0.5 + 1.1 * hits:.1f}")


def test_an_episode_alone_has_one_panel():
    (path,) = paths(draw_trial(Walk(), GridNavi(1, episode_steps=4)))
    assert path.round().tolist() == [[0, 0], [0, 1], [0, 2], [1, 2], [2, 2]]


class Learner:
    """Right in the first episode, up in the others."""

    def train(self, mode=True):
        self.training = mode

    eval = train
    training = False

    def act(self, step, state):
        return {"action": torch.where(step["episode"][:, 0] > 0, 1, 2)}, state


def test_of_several_trials_the_one_that_shows_the_search_is_drawn():
    make = partial(Trials, partial(GridNavi, episode_steps=5), 2)

    def goal(seed):
        env = make(num_envs=1)
        env.set_seed(seed)
        return tuple(env.begin()["task"][0].tolist())

    goals = [goal(seed) for seed in range(trial_picture.TRIALS)]
    # Up from the corner the cell (0, 4) is reached, and stayed on, and to the right it is not.
    assert goals[0] != (0, 4)
    assert goals.count((0, 4)) >= 1
    axes = draw_telling_trial(Learner(), make).axes
    assert tuple(axes[0].lines[0].get_xydata()[0]) == (0, 4)
    # Where no goal is on the way up, none is better than to find nothing twice; of equals the first is drawn.
    others = [seed for seed in range(200) if all(goal(seed + k)[0] > 0 for k in range(trial_picture.TRIALS))]
    first = draw_telling_trial(Learner(), make, seed=others[0]).axes  # of equals the first
    gains = [goal(seed)[1] > 0 for seed in range(others[0], others[0] + trial_picture.TRIALS)]
    assert tuple(first[0].lines[0].get_xydata()[0]) == goal(others[0] + gains.index(True))


def trained(fit, callbacks, env=None):
    make = env or partial(Trials, partial(GridNavi, num_envs=4, episode_steps=4), episodes=2)
    model, data = PPO(minibatches=1), Rollouts(make, steps=None, eval_envs=2)
    fit(model, data, callbacks, 200)
    return model.state_dict(), torch.get_rng_state(), np.random.get_state()[1]


def test_training_is_the_same_with_and_without_it(fit, tmp_path):
    (with_it, state, numpy), (without, state_without, numpy_without) = (
        trained(fit, [TrialPicture(seed=7)]),
        trained(fit, []),
    )
    for name, tensor in without.items():
        assert torch.equal(with_it[name], tensor)
    assert torch.equal(state, state_without)
    assert (numpy == numpy_without).all()
    assert (tmp_path / "trial.png").read_bytes().startswith(b"\x89PNG")


def test_an_environment_without_a_map_is_said_in_one_line(fit, tmp_path, capfd):
    trained(fit, [TrialPicture()], partial(Pendulum, num_envs=4, episode_steps=10))
    assert "No picture of a trial: Pendulum has no map" in capfd.readouterr().err.splitlines()
    assert not (tmp_path / "trial.png").exists()


RECIPE = {
    "experiment": "tiny",
    "frames": 64,
    "trainer": {"accelerator": "cpu", "callbacks": [{"class_path": "TrialPicture"}, {"class_path": "Video"}]},
    "data": {
        "class_path": "Rollouts",
        "init_args": {
            "env": {
                "class_path": "Trials",
                "init_args": {
                    "episodes": 2,
                    "env": {"class_path": "GridNavi", "init_args": {"num_envs": 4, "episode_steps": 4}},
                },
            },
            "steps": None,
        },
    },
    "model": {"class_path": "PPO", "init_args": {"minibatches": 1}},
}


def test_a_recipe_names_it_and_mlflow_has_the_picture(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("drawn.yaml").write_text(yaml.safe_dump(RECIPE))
    assert main(["fit", "-c", "drawn.yaml", "--run", "a"]) == 0
    assert "No video: GridNavi makes no pictures" in capfd.readouterr().err
    client = MlflowClient(f"sqlite:///{Path('runs/mlflow.db').resolve()}")
    (run,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert [file.path for file in client.list_artifacts(run.info.run_id, "pictures")] == ["pictures/trial.png"]
    assert Path("runs/tiny/a/trial.png").exists()
