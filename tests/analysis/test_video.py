"""A video shows what happened, plays where Pillow can read it, and its absence is explained."""

import math
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from PIL import Image

from lightning_hyper.agent import Agent
from lightning_hyper.analysis import video
from lightning_hyper.analysis.video import BACK_END, record
from lightning_hyper.envs import GridNavi, HalfCheetah, Hopper, Pendulum
from lightning_hyper.modules import Spaces
from lightning_hyper.modules.policies import DeterministicPolicy
from lightning_hyper.nn import MLP

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


def agent_of(make_env):
    spaces = Spaces.of(make_env(1))
    return Agent(DeterministicPolicy(spaces, partial(MLP, hidden=[8]), noise=0.0), spaces, {})


def pictures(path):
    with Image.open(path) as played:
        frames = []
        for k in range(played.n_frames):
            played.seek(k)
            frames.append(np.asarray(played.convert("RGB"), dtype=np.float32))
        return np.stack(frames), played.info["duration"]


def test_a_moving_cheetah_is_seen_moving_and_the_file_is_small(tmp_path, back_end, monkeypatch):
    monkeypatch.setenv(BACK_END, back_end)
    path = record(agent_of(HalfCheetah), HalfCheetah, tmp_path / "new" / "cheetah.gif", frames=12)
    frames, milliseconds = pictures(path)
    assert path == tmp_path / "new" / "cheetah.gif"
    assert (len(frames), milliseconds) == (12, 50)
    assert frames[0].std() > 20  # neither black nor empty
    assert np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3)).min() > 0.1
    assert path.stat().st_size * 200 / 12 < 3e6  # ten seconds of it


def test_fast_simulators_are_shown_in_real_time_until_the_episode_ends(tmp_path, back_end, monkeypatch):
    monkeypatch.delenv(BACK_END, raising=False)
    monkeypatch.setattr(video, "BACK_ENDS", ("disable", back_end))  # the second is tried when the first fails
    short = partial(Hopper, episode_steps=12)
    path = record(agent_of(Hopper), short, tmp_path / "hopper.gif", frames=1000)
    frames, milliseconds = pictures(path)
    # 13 positions of 8 ms, every fifth of which is drawn
    assert (len(frames), milliseconds) == (3, 40)


def test_without_a_back_end_one_line_says_what_to_install(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv(BACK_END, "disable")
    assert record(agent_of(HalfCheetah), HalfCheetah, tmp_path / "cheetah.gif", frames=2) is None
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("No video: MuJoCo cannot render here (disable: ")
    assert "libegl1 or libosmesa6" in line
    assert not (tmp_path / "cheetah.gif").exists()


def test_a_pendulum_is_drawn_where_it_is(tmp_path):
    class Still(Pendulum):
        def advance(self, action):
            return super().advance(action * 0)

        def _reset(self, tensordict=None, **options):
            step = super()._reset(tensordict, **options)
            self.set_physics(self._angle * 0 + math.pi / 2, self._velocity * 0)
            return step

    frames, milliseconds = pictures(record(agent_of(Pendulum), Still, tmp_path / "pendulum.gif", frames=4))
    assert (len(frames), milliseconds) == (4, 50)
    rows, columns = np.nonzero(frames[0].min(-1) < 200)
    # Counter-clockwise from upright is to the left, at half of the picture's height.
    assert abs(rows.mean() - 119.5) < 2
    assert columns.mean() < 100
    later, _ = np.nonzero(frames[-1].min(-1) < 200)
    assert later.mean() > rows.mean() + 1  # it falls


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"frames": 0}, "frames is 0"),
        ({"path": "video.mp4"}, "video.mp4"),
        ({"make_env": GridNavi}, "GridNavi"),
    ],
)
def test_what_cannot_be_recorded_is_refused(tmp_path, options, said):
    given = {"frames": 2, "path": "video.gif", "make_env": Pendulum, **options}
    with pytest.raises(ValueError, match=said):
        record(agent_of(Pendulum), given["make_env"], tmp_path / given["path"], frames=given["frames"])
