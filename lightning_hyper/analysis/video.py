"""A video of one episode of a trained agent, as an animated GIF, which browsers and MLflow's pages play as they are.

The episode is simulated here, and rendered by a child process that runs this module, because MuJoCo chooses its
renderer once for a process, when it is first imported, and a graphics driver that fails may end that process.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from lightning_hyper.agent import Agent

Floats = NDArray[np.float64]
Pictures = Iterator[Image.Image]

SIZE = (320, 240)  # pixels, width and height
INTERVAL = 0.04  # seconds between pictures, about; a GIF counts in hundredths
COLOURS = 48  # of a video; fewer make smaller files
CHILD_SECONDS = 300
# The variable that MuJoCo reads, and what to try where it is not set.
BACK_END = "MUJOCO_GL"
BACK_ENDS = ("egl", "osmesa") if sys.platform == "linux" else ("",)
INSTALL = "install a GPU driver with EGL, or Mesa (on Debian or Ubuntu: apt-get install libegl1 or libosmesa6)"


def record(
    agent: Agent, make_env: Callable[..., Any], path: str | Path, *, frames: int = 300, seed: int = 0
) -> Path | None:
    """Write a video of an agent's most likely actions in one episode, in real time.

    Args:
        agent: who acts; its memory is lost.
        make_env: makes the environment, a `MuJoCo` or a `Pendulum`, from `num_envs` and `device`.
        path: a file that ends in `.gif`.
        frames: of the environment at most; less where the episode ends before.
        seed: of the episode's beginning.

    Returns:
        the path, or None where nothing here can render, which is then said in one line on standard error.

    Raises:
        ValueError: frames or path out of range, or an environment without pictures.
    """
    from lightning_hyper.envs import MuJoCo, Pendulum

    path = Path(path)
    if frames < 1 or path.suffix != ".gif":
        raise ValueError(f"record: frames is {frames} and path {path.name}; they must be at least 1, and end in .gif")
    env = make_env(num_envs=1, device="cpu")
    if not isinstance(env, MuJoCo | Pendulum):
        raise ValueError(
            f"record: there are no pictures of {type(env).__name__}; give a MuJoCo environment or Pendulum"
        )
    positions = _episode(agent, env, frames, seed)
    seconds = env.SECONDS if isinstance(env, Pendulum) else env.seconds
    stride = max(1, round(INTERVAL / seconds))
    positions, milliseconds = positions[::stride], round(1000 * stride * seconds)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(env, Pendulum):
        _write(path, map(_pendulum, positions[:, 0]), milliseconds)
        return path
    return _render_apart(env.models[0], positions, path, milliseconds)


def _episode(agent: Agent, env: Any, frames: int, seed: int) -> Floats:
    """Positions `[frames, nq]` of the first environment from the reset until the end of its episode."""
    env.set_seed(seed)
    step = env.reset()
    agent.reset()
    positions, done = [np.asarray(env.qpos())[0]], False
    while not done and len(positions) < frames:
        step["action"] = env.action_spec.zero() + agent.act(step["observation"].numpy())
        step = env.step(step)["next"]
        done = bool(step["done"][0])
        positions.append(np.asarray(env.qpos())[0])
    return np.stack(positions)


def _render_apart(model: Any, positions: Floats, path: Path, milliseconds: int) -> Path | None:
    """Render in a child process with the first back end that works."""
    import mujoco  # type: ignore[import-untyped]

    failures = []
    with tempfile.TemporaryDirectory() as folder:
        compiled, trajectory, made = (Path(folder) / name for name in ("model.mjb", "positions.npy", "video.gif"))
        mujoco.mj_saveModel(model, str(compiled))
        np.save(trajectory, positions)
        command = [sys.executable, "-m", "lightning_hyper.analysis.video"]
        command += [str(compiled), str(trajectory), str(made), str(milliseconds)]
        given = os.environ.get(BACK_END)
        for back_end in (given,) if given else BACK_ENDS:
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
            environment |= {BACK_END: back_end} if back_end else {}
            try:
                child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CHILD_SECONDS)
            except subprocess.TimeoutExpired:
                failures.append(f"{back_end or 'default'}: nothing after {CHILD_SECONDS} s")
                continue
            if child.returncode == 0 and made.exists():
                path.write_bytes(made.read_bytes())
                return path
            said = child.stderr.strip().splitlines() or [f"ended with {child.returncode}"]
            failures.append(f"{back_end or 'default'}: {said[0] if len(said) == 1 else said[-1]}"[:200])
    print(f"No video: MuJoCo cannot render here ({'; '.join(failures)}); {INSTALL}", file=sys.stderr)
    return None


def _scene(model: Any, positions: Floats) -> Pictures:
    """What a camera shows that follows the first body over the ground."""
    import mujoco

    data = mujoco.MjData(model)
    bodies = np.empty((len(positions), model.nbody, 3))
    for place, qpos in zip(bodies, positions, strict=True):
        data.qpos[:] = qpos
        mujoco.mj_kinematics(model, data)
        place[:] = data.xpos
    camera = mujoco.MjvCamera()
    mujoco.mjv_defaultFreeCamera(model, camera)
    moving = bodies[:, 1:]
    # What moves in a horizontal plane is seen from above.
    flat = float(np.ptp(moving[..., 2], axis=0).max()) < 1e-6
    reach = np.linalg.norm(moving - moving[:, :1], axis=-1).max()
    camera.azimuth, camera.elevation = 90, -89 if flat else -12
    camera.distance = max(3.2 * float(reach), 0.8 if flat else 2.5)
    height = float(moving[..., 2].mean())
    with mujoco.Renderer(model, SIZE[1], SIZE[0]) as renderer:
        for qpos, (x, y, _) in zip(positions, moving[:, 0], strict=True):
            data.qpos[:] = qpos
            mujoco.mj_forward(model, data)
            camera.lookat[:] = x, y, height
            renderer.update_scene(data, camera)
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                renderer.scene.flags[flag] = False  # nine tenths of the time where no GPU draws
            yield Image.fromarray(renderer.render())


def _pendulum(angle: float) -> Image.Image:
    """A rod at an angle from upright, counter-clockwise, with a weight at its end."""
    picture = Image.new("RGB", (SIZE[1], SIZE[1]), "white")
    draw, middle, length = ImageDraw.Draw(picture), SIZE[1] / 2, SIZE[1] * 0.4
    tip = (middle - length * math.sin(angle), middle - length * math.cos(angle))
    draw.line([(middle, middle), tip], fill="#0072B2", width=10)
    for (x, y), radius, colour in (((middle, middle), 5, "#444444"), (tip, 12, "#D55E00")):
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
    return picture


def _write(path: Path, pictures: Pictures, milliseconds: int) -> None:
    """Write an endless GIF; all pictures share the colours of the first, without dots that would flicker."""
    first = next(pictures)
    palette = first.quantize(COLOURS, dither=Image.Dither.NONE)
    rest = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    palette.save(path, save_all=True, append_images=rest, duration=milliseconds, loop=0, optimize=False)


def _child(model: str, positions: str, path: str, milliseconds: str) -> None:
    import mujoco

    _write(Path(path), _scene(mujoco.MjModel.from_binary_path(model), np.load(positions)), int(milliseconds))


if __name__ == "__main__":
    _child(*sys.argv[1:])
