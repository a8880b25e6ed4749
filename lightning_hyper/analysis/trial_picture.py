"""A callback that draws a trial of the trained policy on a map."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_hyper.algorithms import Algorithm
from lightning_hyper.analysis.looking import episode, is_finished, log_picture, looking, picture_path
from lightning_hyper.envs import BatchedEnv
from lightning_hyper.training.run import experience

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class TrialPicture(Callback):
    """Draws one trial of the trained policy when training has finished: `trial.png` in the run's folder and MLflow.

    The trial, or episode, is that of an environment made apart, by the most likely actions. Where the environment has
    no map, one line says so.

    Args:
        seed: of the trial.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Algorithm)
        if not is_finished(trainer):
            return
        with looking(pl_module.policy, self.seed):
            env = experience(trainer).make_env(num_envs=1, device=str(pl_module.device))
            env.set_seed(self.seed)
            figure = draw_trial(pl_module.policy, env)
        if figure is None:
            print(f"No picture of a trial: {type(env).__name__} has no map", file=sys.stderr)
            return
        path = picture_path(trainer, "trial.png")
        figure.savefig(path, dpi=150)
        log_picture(trainer, path)


def draw_trial(policy: Any, env: BatchedEnv) -> Figure | None:
    """A figure of the first environment's next trial, a path for each episode; None where it has no map.

    Args:
        policy: who acts, a module with `act`.
        env: begun afresh.
    """
    paths: list[list[np.ndarray]] = []
    returns: list[float] = []
    for step in episode(env, policy):
        where = env.places()
        if where is None:
            return None
        if paths:
            paths[-1].append(where[0])
            returns[-1] += float(step["reward"][0])
        if not paths or len(where) > 1:
            paths.append([where[-1]])
            returns.append(0.0)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 * len(paths), 2.9), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(paths)))
    for k, (axes, path, total) in enumerate(zip(panels, paths, returns, strict=True), 1):
        env.draw_map(axes)
        # Moved aside a little more with every frame, so that ways there and back lie apart.
        width = np.ptp(axes.get_xlim())
        places = np.array(path) + np.linspace(-0.03, 0.03, len(path))[:, None] * width
        axes.plot(*places.T, color="#0072B2", linewidth=1.5, marker="o", markersize=3)
        axes.plot(*places[0], marker="o", color="#0072B2", markersize=9, fillstyle="none")
        axes.set_title(f"episode {k}: {total:.1f}")
    return figure
