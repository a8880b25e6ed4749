"""Checkpoints that continue a run bit for bit."""

from __future__ import annotations

import math
import os
import random
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import distributed as dist

from lightning_hyper.algorithms import Algorithm
from lightning_hyper.checkpoint_file import CheckpointError, read_checkpoint
from lightning_hyper.checks import RecipeError
from lightning_hyper.experience.base import rank_seed
from lightning_hyper.folder import RunFolder, replay_beside
from lightning_hyper.training.mlflow import MLflowLogger
from lightning_hyper.training.run import experience


class Checkpoints(Checkpoint):
    """Writes `last.ckpt` after every evaluation and at a stop, `best.ckpt`, and one to keep every so many frames.

    They lie in `checkpoints/` under the trainer's `default_root_dir`. Each is written beside its name and then moved
    there, so that a file of that name is always whole. A replay buffer lies beside them in a folder
    `replay-<frames>/`, which the checkpoints of that frame name and which goes when the last of them does.

    Args:
        monitor: metric by which a checkpoint is the best.
        mode: whether its `max` or `min` is best.
        every: frames between the checkpoints `frames=<N>.ckpt` that are kept for good; null keeps none.
    """

    def __init__(
        self, *, monitor: str = "eval/return", mode: Literal["max", "min"] = "max", every: int | None = None
    ) -> None:
        if every is not None and every < 1:
            raise RecipeError(f"checkpoint.every is {every}; it must be at least 1 frame, or null")
        self.monitor, self.mode, self.every = monitor, mode, every
        self.best: float | None = None
        self.kept = 0
        self._written = -1  # frame of the newest checkpoint
        self._frames: dict[tuple[Path, int], int | None] = {}  # of each checkpoint file, by when it was written

    def on_evaluation_end(self, trainer: Trainer, pl_module: Algorithm, metrics: dict[str, float]) -> None:
        folder = RunFolder(Path(trainer.default_root_dir))
        copies = []
        value = metrics.get(self.monitor)
        if value is not None and math.isfinite(value) and self._is_best(value):
            self.best = value
            copies.append(folder.best)
        self._write(trainer, pl_module, copies)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Algorithm)
        frames = pl_module.clock.frames
        if self.every is not None and frames // self.every > self.kept:
            self.kept = frames // self.every
            self._write(trainer, pl_module, [RunFolder(Path(trainer.default_root_dir)).kept(frames)])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Algorithm)
        if pl_module.clock.frames > self._written:
            self._write(trainer, pl_module, [])

    def _is_best(self, value: float) -> bool:
        return self.best is None or (value > self.best if self.mode == "max" else value < self.best)

    def _write(self, trainer: Trainer, model: Algorithm, copies: list[Path]) -> None:
        folder, frames = RunFolder(Path(trainer.default_root_dir)), model.clock.frames
        last, partial = folder.last, folder.last.with_name("last.ckpt.part")
        try:
            self._write_buffer(trainer, folder.replay(frames))
            trainer.save_checkpoint(partial, weights_only=False)
            if trainer.is_global_zero:
                os.replace(partial, last)
                for copy in copies:
                    shutil.copyfile(last, partial)
                    os.replace(partial, copy)
                for path in (last, *copies):
                    self._frames[_version(path)] = frames
                self._drop_buffers(folder)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OSError(
                f"root: cannot write a checkpoint in {folder.checkpoints} ({error}); earlier ones are whole"
            ) from error
        self._written = frames

    @staticmethod
    def _write_buffer(trainer: Trainer, folder: Path) -> None:
        partial = folder.with_name(f"{folder.name}.part")
        try:
            written = experience(trainer).save_buffer(partial / f"rank-{trainer.global_rank}")
            trainer.strategy.barrier("replay buffers are written")
            if written and trainer.is_global_zero:
                shutil.rmtree(folder, ignore_errors=True)  # left by a run that was cut before its checkpoint
                os.replace(partial, folder)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _drop_buffers(self, folder: RunFolder) -> None:
        """Delete the replay buffers of a run that go with none of its checkpoints."""
        if not (buffers := set(folder.replays())):
            return
        frames = {self._frames_of(path) for path in folder.checkpoints.glob("*.ckpt")}
        if None not in frames:
            for path in buffers - {folder.replay(count) for count in frames if count is not None}:
                shutil.rmtree(path)

    def _frames_of(self, path: Path) -> int | None:
        """Frames of a checkpoint file; None where it is not whole, such as one being copied."""
        # Read only where this process did not write it: a run that goes on from an older checkpoint finds such files.
        if (version := _version(path)) not in self._frames:
            try:
                self._frames[version] = int(read_checkpoint(path)["frames"])
            except CheckpointError as error:
                rank_zero_warn(f"{error}; no replay buffer is deleted meanwhile")
                self._frames[version] = None
        return self._frames[version]

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "kept": self.kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.kept = state_dict["best"], state_dict["kept"]


def _version(path: Path) -> tuple[Path, int]:
    return path, path.stat().st_mtime_ns


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints straight to their place, in which there is room or none; Lightning's way is by `TMPDIR`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except RuntimeError as error:  # PyTorch's word for a disk that is full
            raise OSError(str(error).splitlines()[0]) from error


class RunState(Callback):
    """Puts into a checkpoint what Lightning leaves out: generators, experience and algorithm of every rank.

    Args:
        facts: plain entries that go into every checkpoint besides (recipe, matrix-product path).
    """

    def __init__(self, facts: dict[str, Any] | None = None) -> None:
        self.facts = facts or {}
        self._generators: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, Algorithm)
        own = {
            "generators": _generators(),
            "experience": experience(trainer).save_state(),
            "algorithm": pl_module.save_state(),
        }
        ranks = [own]
        if trainer.world_size > 1:
            ranks = [{} for _ in range(trainer.world_size)]
            dist.all_gather_object(ranks, own)
        # Asked for here and not at the start, because the logger opens its run while training begins.
        run_id = trainer.logger.run_id() if isinstance(trainer.logger, MLflowLogger) else None
        checkpoint.update(self.facts, ranks=ranks, run_id=run_id)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, Algorithm)
        if trainer.state.fn != "fit":
            return
        ranks = checkpoint["ranks"]
        if len(ranks) != trainer.world_size:
            raise RecipeError(
                f"trainer.devices: the checkpoint is of {len(ranks)} rank(s) and training now has "
                f"{trainer.world_size}; continue with the same number"
            )
        own, data = ranks[trainer.global_rank], experience(trainer)
        self._generators = own["generators"]
        try:
            data.load_state(own["experience"])
            pl_module.load_state(own["algorithm"])
        except CheckpointError as error:
            raise CheckpointError(f"{error} (of {trainer.ckpt_path})") from error
        if trainer.ckpt_path is not None:
            replay = replay_beside(Path(trainer.ckpt_path), checkpoint["frames"])
            data.load_buffer(replay / f"rank-{trainer.global_rank}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The last thing before the first batch: everything that start-up drew is undone.
        if self._generators is not None:
            _set_generators(self._generators)
            assert isinstance(pl_module, Algorithm)
            pl_module.take_rates()
        elif trainer.global_rank:
            seed = rank_seed(torch.initial_seed(), trainer.global_rank)
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # TorchRL's prioritised sampler draws from it


def _generators() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [name, [int(k) for k in keys], *rest],  # type: ignore[union-attr]
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_generators(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
