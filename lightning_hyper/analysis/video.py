"""A callback that films an episode of the trained policy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_hyper.algorithms import Algorithm
from lightning_hyper.analysis.looking import episode, is_finished, log_picture, looking, picture_path
from lightning_hyper.checks import RecipeError
from lightning_hyper.envs import BatchedEnv
from lightning_hyper.training.run import experience

INTERVAL = 0.04  # seconds between pictures, about; a GIF counts in hundredths
UNTIMED = 0.1  # seconds that a frame is shown for where the environment does not say how long it takes


class Video(Callback):
    """Films one episode of the trained policy when training has finished: `episode.gif` in the run's folder and MLflow.

    The episode is that of an environment made apart, by the most likely actions. Where the environment cannot be
    filmed, one line says so.

    Args:
        frames: most that are filmed.
        seed: of the episode.

    Raises:
        RecipeError: no frames.
    """

    def __init__(self, *, frames: int = 300, seed: int = 0) -> None:
        if frames < 1:
            raise RecipeError(f"trainer.callbacks Video.frames is {frames}; it must be at least 1")
        self.frames, self.seed = frames, seed

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Algorithm)
        if is_finished(trainer):
            path, make = picture_path(trainer, "episode.gif"), experience(trainer).make_env
            device = str(pl_module.device)
            if record(pl_module.policy, make, path, frames=self.frames, seed=self.seed, device=device):
                log_picture(trainer, path)


def record(
    policy: Any,
    make_env: Callable[..., BatchedEnv],
    path: str | Path,
    *,
    frames: int = 300,
    seed: int = 0,
    device: str = "cpu",
) -> Path | None:
    """Film a policy's most likely actions in one episode, in real time.

    Args:
        policy: who acts, a module with `act`.
        make_env: makes the environment from `num_envs` and `device`.
        path: a file that ends in `.gif`.
        frames: most that are filmed; less where the episode ends before.
        seed: of the episode.
        device: where policy and environment live.

    Returns:
        the path, or None where nothing here can film it, which one line on standard error then says.

    Raises:
        ValueError: frames or path out of range.
    """
    path = Path(path)
    if frames < 1 or path.suffix != ".gif":
        raise ValueError(f"record: frames is {frames} and path {path.name}; they must be at least 1, and end in .gif")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with looking(policy, seed):
            env = make_env(num_envs=1, device=device).filmed()
            env.set_seed(seed)
            sights = [env.sight() for _ in episode(env, policy, frames)]
            seconds = env.seconds or UNTIMED
            stride = max(1, round(INTERVAL / seconds))
            env.film(sights[::stride], path, stride * seconds)
            env.close()
    # Whatever a simulator, or a graphics driver behind it, has to say: a finished training does not fail by it.
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"No video: {said}", file=sys.stderr)
        return None
    return path
