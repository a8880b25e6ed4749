"""What all share that look at a trained policy: they look when training is over, and change nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from lightning_hyper.envs import BatchedEnv, Step
from lightning_hyper.experience.collection import Policy
from lightning_hyper.folder import RunFolder
from lightning_hyper.training.mlflow import MLflowLogger
from lightning_hyper.training.stop import GracefulStop


@contextmanager
def apart(seed: int) -> Iterator[None]:
    """Draw with a seed of one's own; the generators of PyTorch, NumPy and Python are left as they were."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    before = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
    finally:
        np.random.set_state(before[0])
        random.setstate(before[1])


@contextmanager
def looking(policy: nn.Module, seed: int) -> Iterator[None]:
    """Let a policy act by its most likely actions, without gradients and `apart`."""
    training = policy.training
    policy.eval()
    try:
        with apart(seed), torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            yield
    finally:
        policy.train(training)


def episode(env: BatchedEnv, policy: Policy, frames: int | None = None) -> Iterator[Step]:
    """What an environment shows until the first of its episodes (or trials) ends, from the beginning on.

    Args:
        env: begun afresh.
        policy: acts.
        frames: most that are given, the beginning included.
    """
    step: Any = env.begin()
    state, shown = None, 1
    yield step
    while (frames is None or shown < frames) and not (shown > 1 and bool(step["done"][0])):
        chosen, state = policy.act(step, state)
        step = env.advance(chosen["action"])
        shown += 1
        yield step


def is_finished(trainer: Trainer) -> bool:
    """Whether training has come to its end, and not been stopped by a signal; only the first rank looks."""
    stopped = any(isinstance(each, GracefulStop) and each.signal is not None for each in cast(Any, trainer).callbacks)
    return trainer.is_global_zero and not stopped


def picture_path(trainer: Trainer, name: str) -> Path:
    """Where a run keeps a picture; its folder is made."""
    folder = RunFolder(Path(trainer.default_root_dir)).path
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def log_picture(trainer: Trainer, path: Path) -> None:
    """Give a picture to MLflow, as an artifact of the run."""
    for logger in trainer.loggers:
        if isinstance(logger, MLflowLogger):
            logger.log_artifact(path, "pictures")
