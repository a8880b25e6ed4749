"""A callback that draws a trial of the trained policy on a map."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray

from lightning_hyper.algorithms import Algorithm
from lightning_hyper.analysis.looking import episode, is_finished, log_picture, looking, picture_path
from lightning_hyper.envs import BatchedEnv
from lightning_hyper.training.run import experience

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRIALS = 16  # of which one is drawn


class TrialPicture(Callback):
    """Draws one trial of the trained policy when training has finished: `trial.png` in the run's folder and MLflow.

    The trial, or episode, is one of an environment made apart, by the most likely actions: of 16 trials the one in
    which the last episode pays most above the first, since there the agent searches and then knows. Where the
    environment has no map, one line says so.

    Args:
        seed: of the first of these trials; each further one has the next seed.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Algorithm)
        if not is_finished(trainer):
            return
        make, device = experience(trainer).make_env, str(pl_module.device)
        figure = draw_telling_trial(pl_module.policy, make, seed=self.seed, device=device)
        if figure is None:
            print(f"No picture of a trial: {type(experience(trainer).env).__name__} has no map", file=sys.stderr)
            return
        path = picture_path(trainer, "trial.png")
        figure.savefig(path, dpi=150)
        log_picture(trainer, path)


def draw_telling_trial(
    policy: Any, make_env: Callable[..., BatchedEnv], *, seed: int = 0, device: str = "cpu"
) -> Figure | None:
    """A figure of the trial, of several, in which the last episode pays most above the first; None without a map.

    Args:
        policy: who acts, a module with `act`.
        make_env: makes the environment from `num_envs` and `device`.
        seed: of the first trial; each further one has the next seed.
        device: where policy and environment live.
    """

    def begun(seed: int) -> BatchedEnv:
        env = make_env(num_envs=1, device=device)
        env.set_seed(seed)
        return env

    best, most = seed, -math.inf
    for each in range(seed, seed + TRIALS):
        with looking(policy, each):
            walked = _walk(policy, begun(each))
        if walked is None:
            return None
        returns = walked[1]
        if returns[-1] - returns[0] > most + 1e-4:  # of equals the first, whatever the rounding
            best, most = each, returns[-1] - returns[0]
    with looking(policy, best):
        return draw_trial(policy, begun(best))


def _walk(policy: Any, env: BatchedEnv) -> tuple[list[list[NDArray[Any]]], list[float]] | None:
    """Places and return of each episode of the first environment's next trial; None where there is no map."""
    paths: list[list[NDArray[Any]]] = []
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
    return paths, returns


def draw_trial(policy: Any, env: BatchedEnv) -> Figure | None:
    """A figure of the first environment's next trial, a path for each episode; None where it has no map.

    Args:
        policy: who acts, a module with `act`.
        env: begun afresh.
    """
    walked = _walk(policy, env)
    if walked is None:
        return None
    paths, returns = walked
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
