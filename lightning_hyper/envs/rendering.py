"""Films as animated GIFs, which browsers and MLflow's pages play as they are.

MuJoCo is rendered by a child process that runs this file, because it chooses its renderer once for a process, when it
is first imported, and a graphics driver that fails may end that process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Picture = NDArray[np.uint8]

SIZE = (320, 240)  # pixels, width and height, of what is rendered here
COLOURS = 48  # of a film; fewer make smaller files
CHILD_SECONDS = 300
# The variable that MuJoCo reads, and what to try where it is not set.
BACK_END = "MUJOCO_GL"
BACK_ENDS = ("egl", "osmesa") if sys.platform == "linux" else ("",)
INSTALL = "install a GPU driver with EGL, or Mesa (on Debian or Ubuntu: apt-get install libegl1 or libosmesa6)"


class FilmError(RuntimeError):
    """Something cannot be filmed; the message is one sentence that says why."""


def write_gif(path: Path, pictures: Iterable[Picture], seconds: float) -> None:
    """Write an endless film; all pictures share the colours of the first, without dots that would flicker.

    Args:
        path: a file that ends in `.gif`.
        pictures: one or more, `[height, width, 3]` each.
        seconds: that each is shown for; hundredths count.
    """
    images = map(Image.fromarray, pictures)
    first = next(images).quantize(COLOURS, dither=Image.Dither.NONE)
    rest = [image.quantize(palette=first, dither=Image.Dither.NONE) for image in images]
    first.save(path, save_all=True, append_images=rest, duration=round(1000 * seconds), loop=0, optimize=False)


def film_mujoco(model: Any, positions: Sequence[NDArray[Any]], path: Path, seconds: float) -> None:
    """Film a MuJoCo model in a child process, with the first of its back ends that works.

    Args:
        model: the compiled `mujoco.MjModel`.
        positions: generalised positions `[nq]`, one for each picture.
        path, seconds: as in `write_gif`.

    Raises:
        FilmError: no back end works.
    """
    import mujoco  # type: ignore[import-untyped]

    failures = []
    with tempfile.TemporaryDirectory() as folder:
        compiled, trajectory, made = (Path(folder) / name for name in ("model.mjb", "positions.npy", "film.gif"))
        mujoco.mj_saveModel(model, str(compiled))
        np.save(trajectory, np.stack(positions))
        # -P: the modules beside this file are not to be found by their bare names.
        command = [sys.executable, "-P", __file__, str(compiled), str(trajectory), str(made), str(seconds)]
        given = os.environ.get(BACK_END)
        for back_end in (given,) if given else BACK_ENDS:
            environment = {**os.environ, **({BACK_END: back_end} if back_end else {})}
            try:
                child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CHILD_SECONDS)
            except subprocess.TimeoutExpired:
                failures.append(f"{back_end or 'default'}: nothing after {CHILD_SECONDS} s")
                continue
            if child.returncode == 0 and made.exists():
                path.write_bytes(made.read_bytes())
                return
            said = child.stderr.strip().splitlines() or [f"ended with {child.returncode}"]
            failures.append(f"{back_end or 'default'}: {said[0] if len(said) == 1 else said[-1]}"[:200])
    raise FilmError(f"MuJoCo cannot render here ({'; '.join(failures)}); {INSTALL}")


def _scene(model: Any, positions: NDArray[Any]) -> Iterator[Picture]:
    """What a camera shows that follows the first body over the ground, for positions `[pictures, nq]`."""
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
            yield renderer.render()


def _child(model: str, positions: str, path: str, seconds: str) -> None:
    import mujoco

    write_gif(Path(path), _scene(mujoco.MjModel.from_binary_path(model), np.load(positions)), float(seconds))


if __name__ == "__main__":
    _child(*sys.argv[1:])
