"""A video shows what happened, plays where Pillow can read it, changes nothing, and its absence is explained."""

import math
import os
import random
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image

from lightning_hyper.algorithms import PPO
from lightning_hyper.analysis.video import Video, record
from lightning_hyper.envs import GridNavi, Gym, HalfCheetah, Hopper, Pendulum, Trials, rendering
from lightning_hyper.envs.rendering import BACK_END
from lightning_hyper.experience import Rollouts
from lightning_hyper.training.stop import GracefulStop

RENDER = """
import mujoco
mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8).render()
"""


def renders(back_end):
    command = [sys.executable, "-c", RENDER]
    return subprocess.run(command, env={**os.environ, BACK_END: back_end}, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def back_end():
    found = next((name for name in ("egl", "osmesa") if renders(name)), None)
    if found is None:
        pytest.skip("MuJoCo cannot render here: neither EGL nor OSMesa works")
    return found


class Pushing(torch.nn.Module):
    """The same action always, a half of what is largest, or the second there is."""

    def act(self, step, state):
        previous = step["previous_action"]
        return {"action": torch.full_like(previous, 0.5 if previous.is_floating_point() else 1)}, state


def pictures(path):
    with Image.open(path) as played:
        frames = []
        for k in range(played.n_frames):
            played.seek(k)
            frames.append(np.asarray(played.convert("RGB"), dtype=np.float32))
        return np.stack(frames), played.info["duration"]


def test_a_moving_cheetah_is_seen_moving_and_the_file_is_small(tmp_path, back_end, monkeypatch):
    monkeypatch.setenv(BACK_END, back_end)
    path = record(Pushing(), HalfCheetah, tmp_path / "new" / "cheetah.gif", frames=12)
    frames, milliseconds = pictures(path)
    assert path == tmp_path / "new" / "cheetah.gif"
    assert (len(frames), milliseconds) == (12, 50)
    assert frames[0].std() > 20  # neither black nor empty
    assert np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3)).min() > 0.1
    assert path.stat().st_size * 200 / 12 < 3e6  # ten seconds of it


def test_fast_simulators_are_shown_in_real_time_until_the_episode_ends(tmp_path, back_end, monkeypatch):
    monkeypatch.delenv(BACK_END, raising=False)
    monkeypatch.setattr(rendering, "BACK_ENDS", ("disable", back_end))  # the second is tried when the first fails
    path = record(Pushing(), partial(Hopper, episode_steps=12), tmp_path / "hopper.gif", frames=1000)
    frames, milliseconds = pictures(path)
    # 13 positions of 8 ms, every fifth of which is drawn
    assert (len(frames), milliseconds) == (3, 40)


def test_without_a_back_end_one_line_says_what_to_install(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv(BACK_END, "disable")
    assert record(Pushing(), HalfCheetah, tmp_path / "cheetah.gif", frames=2) is None
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("No video: MuJoCo cannot render here (disable: ")
    assert "libegl1 or libosmesa6" in line
    assert not (tmp_path / "cheetah.gif").exists()


def test_a_pendulum_is_drawn_where_it_is(tmp_path):
    class Falling(Pendulum):
        def start(self, rows):
            super().start(rows)
            self.set_physics(torch.full((1, 1), math.pi / 2), torch.zeros(1, 1))

        def simulate(self, action):
            return super().simulate(action * 0)

    frames, milliseconds = pictures(record(Pushing(), Falling, tmp_path / "pendulum.gif", frames=4))
    assert (len(frames), milliseconds) == (4, 50)
    rows, columns = np.nonzero(frames[0].min(-1) < 200)
    # Counter-clockwise from upright is to the left, at half of the picture's height.
    assert abs(rows.mean() - 119.5) < 2
    assert columns.mean() < 100
    later, _ = np.nonzero(frames[-1].min(-1) < 200)
    assert later.mean() > rows.mean() + 1  # it falls


def test_an_environment_of_gymnasium_is_filmed_by_its_own_pictures(tmp_path):
    frames, milliseconds = pictures(record(Pushing(), partial(Gym, "CartPole-v1"), tmp_path / "pole.gif", seed=3))
    # CartPole's frames take 0.02 s, every second of which is shown; pushed to one side the pole falls in a moment.
    assert milliseconds == 40
    assert 4 <= len(frames) <= 7
    other = Gym("CartPole-v1", 1, render=True)
    other.set_seed(3)
    other.begin()
    np.testing.assert_allclose(frames[0], other.render(), atol=10)  # within the palette
    assert np.abs(frames[-1] - frames[0]).mean() > 0.1


def test_trials_are_filmed_as_what_they_are_trials_of(tmp_path):
    inner = partial(Gym, "Pendulum-v1", tasks=[{"g": 2.0}, {"g": 9.0}], arguments={"max_episode_steps": 4})
    frames, _ = pictures(record(Pushing(), partial(Trials, inner, episodes=3), tmp_path / "trial.gif"))
    assert len(frames) == 13


def trained(fit, callbacks, env=Pendulum):
    data = Rollouts(partial(env, num_envs=4, episode_steps=10), steps=10, eval_envs=2)
    model = PPO(minibatches=1)
    fit(model, data, callbacks, 80)
    return model.state_dict(), (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())


def test_training_is_the_same_with_and_without_it(fit, tmp_path):
    (with_it, generators), (without, generators_without) = trained(fit, [Video(frames=5, seed=7)]), trained(fit, [])
    for name, tensor in without.items():
        assert torch.equal(with_it[name], tensor)
    assert torch.equal(generators[0], generators_without[0])
    assert generators[1:] == generators_without[1:]
    frames, _ = pictures(tmp_path / "episode.gif")
    assert len(frames) == 5


def test_a_training_that_was_stopped_is_not_filmed(fit, tmp_path):
    class Interrupt(Callback):
        def on_train_batch_end(self, trainer, *_):
            stop.signal = 2

    stop = GracefulStop()
    trained(fit, [Video(frames=2), Interrupt(), stop])
    assert not (tmp_path / "episode.gif").exists()


class Closed(Pendulum):
    def render(self):
        raise OSError("the screen is gone\nand more")


@pytest.mark.parametrize(
    ("env", "said"),
    [(GridNavi, "No video: GridNavi makes no pictures"), (Closed, "No video: the screen is gone")],
)
def test_what_cannot_be_filmed_is_said_in_one_line_and_does_not_fail(fit, tmp_path, capfd, env, said):
    trained(fit, [Video()], env)
    assert said in capfd.readouterr().err.splitlines()
    assert not (tmp_path / "episode.gif").exists()


def test_what_is_out_of_range_names_its_key(tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.callbacks Video\.frames is 0"):
        Video(frames=0)
    with pytest.raises(ValueError, match=r"video\.mp4"):
        record(Pushing(), Pendulum, tmp_path / "video.mp4")
