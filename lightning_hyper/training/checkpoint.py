"""Checkpoints that continue a run bit for bit."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import distributed as dist

from lightning_hyper.algorithms import Algorithm
from lightning_hyper.checkpoint_file import CheckpointError, read_checkpoint

BUFFER = "replay-"  # folder of a replay buffer, before the frame of its checkpoint


class Checkpoints(Checkpoint):
    """Writes `last.ckpt` at the end of every epoch, `best.ckpt`, and one to keep every so many frames.

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
        if mode not in ("max", "min"):
            raise ValueError(f"checkpoint.mode is {mode!r}; it must be 'max' or 'min'")
        if every is not None and every < 1:
            raise ValueError(f"checkpoint.every is {every}; it must be at least 1 frame, or null")
        self.monitor, self.mode, self.every = monitor, mode, every
        self.best: float | None = None
        self.kept = 0
        self._frames: dict[tuple[Path, int], int | None] = {}  # of each checkpoint file, by when it was written

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Algorithm)
        names = []
        value = trainer.callback_metrics.get(self.monitor)
        if value is not None and self._is_best(float(value)):
            self.best = float(value)
            names.append("best.ckpt")
        if self.every is not None and pl_module.clock.frames // self.every > self.kept:
            self.kept = pl_module.clock.frames // self.every
            names.append(f"frames={pl_module.clock.frames}.ckpt")
        self._write(trainer, pl_module.clock.frames, names)

    def _is_best(self, value: float) -> bool:
        return self.best is None or (value > self.best if self.mode == "max" else value < self.best)

    def _write(self, trainer: Trainer, frames: int, copies: list[str]) -> None:
        folder = Path(trainer.default_root_dir) / "checkpoints"
        last, partial = folder / "last.ckpt", folder / "last.ckpt.part"
        try:
            self._write_buffer(trainer, folder / f"{BUFFER}{frames}")
            trainer.save_checkpoint(partial)
            if trainer.is_global_zero:
                os.replace(partial, last)
                for name in copies:
                    shutil.copyfile(last, partial)
                    os.replace(partial, folder / name)
                for name in ("last.ckpt", *copies):
                    self._frames[_version(folder / name)] = frames
                self._drop_buffers(folder)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OSError(f"root: cannot write a checkpoint in {folder} ({error}); earlier ones are whole") from error

    @staticmethod
    def _write_buffer(trainer: Trainer, folder: Path) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        partial = folder.with_name(f"{folder.name}.part")
        try:
            written = data.save_buffer(partial / f"rank-{trainer.global_rank}")
            trainer.strategy.barrier("replay buffers are written")
            if written and trainer.is_global_zero:
                shutil.rmtree(folder, ignore_errors=True)  # left by a run that was cut before its checkpoint
                os.replace(partial, folder)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _drop_buffers(self, folder: Path) -> None:
        """Delete the replay buffers of a folder that go with none of the checkpoints there."""
        if not (buffers := set(folder.glob(f"{BUFFER}*"))):
            return
        frames = {self._frames_of(path) for path in folder.glob("*.ckpt")}
        if None not in frames:
            for path in buffers - {folder / f"{BUFFER}{count}" for count in frames}:
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


class RunState(Callback):
    """Puts into a checkpoint what Lightning leaves out: generators and collection of every rank, the logger's run id.

    An epoch that a stop cut short is finished on continuing, where Lightning would begin another: evaluations come at
    the frames where they would have come without the stop.

    Args:
        facts: plain entries that go into every checkpoint besides (recipe, matrix-product path).
    """

    def __init__(self, facts: dict[str, Any] | None = None) -> None:
        self.facts = facts or {}
        self._generators: dict[str, Any] | None = None
        self._batches_of_epoch = 0

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, Algorithm)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        own = {"generators": _generators(), "collection": data.collection_state(), "algorithm": pl_module.rank_state()}
        ranks = [own]
        if trainer.world_size > 1:
            ranks = [{} for _ in range(trainer.world_size)]
            dist.all_gather_object(ranks, own)
        # Asked for here and not at the start, because the logger opens its run while training begins.
        run_id = trainer.logger.version if trainer.logger is not None else None
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        checkpoint.update(self.facts, ranks=ranks, run_id=run_id, batches_of_epoch=done)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        ranks = checkpoint["ranks"]
        if len(ranks) != trainer.world_size:
            raise ValueError(
                f"trainer.devices: the checkpoint is of {len(ranks)} rank(s) and training now has "
                f"{trainer.world_size}; continue with the same number"
            )
        own = ranks[trainer.global_rank]
        self._generators, self._batches_of_epoch = own["generators"], checkpoint["batches_of_epoch"]
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        data.restore_collection(own["collection"])
        assert isinstance(pl_module, Algorithm)
        pl_module.load_rank_state(own["algorithm"])
        if trainer.ckpt_path is not None:
            folder = Path(trainer.ckpt_path).parent / f"{BUFFER}{checkpoint['frames']}"
            data.restore_buffer(folder / f"rank-{trainer.global_rank}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The last thing before the first batch: everything that start-up drew is undone.
        if self._generators is not None:
            _set_generators(self._generators)
        elif trainer.global_rank:
            seed = torch.initial_seed() + trainer.global_rank
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # TorchRL's prioritised sampler draws from it

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Lightning counts an epoch's batches from its first one on, and has just counted this one.
        done = self._batches_of_epoch % int(trainer.num_training_batches)
        trainer.fit_loop.epoch_loop.batch_progress.current.ready += done
        self._batches_of_epoch = 0


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
