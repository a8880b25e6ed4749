"""Checkpoints as files."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch


class CheckpointError(ValueError):
    """A checkpoint that is missing, cut short, or not one of ours."""


def read_checkpoint(path: str | Path, *, key: str = "ckpt_path") -> dict[str, Any]:
    """Contents of a checkpoint, on the CPU; nothing in it is executed.

    Args:
        path: the file.
        key: recipe key that names it, for messages.

    Raises:
        CheckpointError: the file is missing, truncated or foreign.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{key}: there is no file {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{key}: {path} is truncated or no checkpoint ({str(error).splitlines()[0]})") from error
    if not isinstance(checkpoint, dict) or not {"recipe", "spaces", "state_dict"} <= checkpoint.keys():
        raise CheckpointError(f"{key}: {path} was not written by lightning-hyper")
    return checkpoint
