"""Checkpoints as files: data that is checked before anything is made of it."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_hyper.checks import RecipeError
from lightning_hyper.envs import gym_spaces

DEEPEST, MOST, LONGEST = 64, 1_000_000, 3_000  # levels of a file, values in it, values in its recipe
LARGEST = 2**24  # numbers of an observation, or of an action


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or not of this run; the message names the file or the entry at fault."""


class EntryError(Exception):
    """What is wrong with an entry of a file, or of something in it.

    Args:
        fault: what is wrong.
        entry: keys that lead to it.
    """

    def __init__(self, fault: str, *entry: Any) -> None:
        super().__init__(fault)
        self.entry = entry

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.entry))} {self.args[0]}".strip()


def read_checkpoint(path: str | Path, *, key: str = "ckpt_path") -> dict[str, Any]:
    """Contents of a checkpoint, on the CPU; nothing in it is executed.

    What every checkpoint has is checked, so that it can be relied on: `recipe`, `spaces`, `state_dict` and `frames`,
    and, where they are there, `run_id`, `matmul` and `ranks`.

    Args:
        path: the file.
        key: recipe key that names it, for messages.

    Raises:
        CheckpointError: the file is missing, damaged or foreign.
    """
    checkpoint = read_archive(path, key)
    if not {"recipe", "spaces", "state_dict", "frames"} <= checkpoint.keys():
        raise CheckpointError(f"{key}: {path} was not written by lightning-hyper")
    try:
        _check_entries(checkpoint)
    except EntryError as error:
        raise CheckpointError(f"{key}: {path} is damaged: its entry {error}") from error
    return checkpoint


def read_archive(path: str | Path, key: str) -> dict[str, Any]:
    """What `torch.save` wrote, a dictionary of tensors and plain data; nothing in it is executed.

    Raises:
        CheckpointError: there is no such file, bytes of it are missing or changed, or it is something else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{key}: there is no file {path}" + (", but a folder" if path.is_dir() else ""))
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise CheckpointError(f"{key}: {path} was not written by lightning-hyper: it is compressed")
            broken = archive.testzip()  # PyTorch leaves the checksums unread
        contents = None if broken else torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a file may make anything of its readers
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{key}: {path} is truncated or no checkpoint ({said})") from error
    if broken:
        raise CheckpointError(f"{key}: {path} is damaged: bytes of its entry {broken} have changed")
    if not isinstance(contents, dict):
        raise CheckpointError(f"{key}: {path} was not written by lightning-hyper")
    try:
        _count(contents, DEEPEST, MOST)
    except EntryError as error:
        raise CheckpointError(f"{key}: {path} is damaged: its entry {error}") from error
    return contents


def require_like(found: Any, own: Any, *entry: Any) -> None:
    """Check that a state is one that can be taken over: that it has the keys, types and shapes of the present one.

    What an empty dictionary, a size of 0 and a list stand for depends on the time, and is not compared.

    Args:
        found: state of a checkpoint.
        own: state of the same object as it is now.
        entry: keys that lead to it, for messages.

    Raises:
        EntryError: it differs, or is not finite; names the first entry that does.
    """
    if isinstance(own, Mapping):
        if not isinstance(found, Mapping):
            raise EntryError(f"is {_shown(found)}; it must be a dictionary", *entry)
        for name in dict.fromkeys([*own, *found]) if own else ():
            if name not in own or name not in found:
                raise EntryError("is missing" if name in own else "is not of this run", *entry, name)
            require_like(found[name], own[name], *entry, name)
    elif isinstance(own, Tensor):
        same = isinstance(found, Tensor) and found.ndim == own.ndim and found.dtype == own.dtype
        if not same or any(size not in (0, there) for size, there in zip(own.shape, found.shape, strict=True)):
            raise EntryError(f"is {_shown(found)}, and here it is {_shown(own)}", *entry)
        if own.is_floating_point() and bool(own.isfinite().all()) and not bool(found.isfinite().all()):
            raise EntryError("is NaN or infinite", *entry)
    elif own is not None and type(found) is not type(own):
        raise EntryError(f"is {_shown(found)}; it must be of type {type(own).__name__}", *entry)


def require_weights(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Check that the weights of a checkpoint are those of a model, and numbers.

    Args:
        found: the checkpoint's.
        own: the model's.

    Raises:
        EntryError: one is missing, of another shape, of no model's part, or not finite; names it.
    """
    for name in dict.fromkeys([*own, *found]):
        if name not in own or name not in found:
            raise EntryError("is missing" if name in own else "is no part of the model", "state_dict", name)
        if found[name].shape != own[name].shape or found[name].is_complex() != own[name].is_complex():
            raise EntryError(f"is {_shown(found[name])}, and the model has {_shown(own[name])}", "state_dict", name)
        # A mask may be infinite, and then it is so from the beginning.
        if bool(own[name].isfinite().all()) and not bool(found[name].isfinite().all()):
            raise EntryError("is NaN or infinite", "state_dict", name)


@contextmanager
def within(*entry: Any) -> Iterator[None]:
    """Within, an EntryError is about what lies below an entry."""
    try:
        yield
    except EntryError as error:
        error.entry = (*entry, *error.entry)
        raise


@contextmanager
def taken_over(*entry: Any) -> Iterator[None]:
    """Within, an entry of the checkpoint that is continued is taken over.

    Raises:
        CheckpointError: it is not what it should be, or its reader fails; names the entry.
    """
    try:
        with within(*entry):
            yield
    except EntryError as error:
        raise CheckpointError(f"ckpt_path: the checkpoint is damaged or another's: its entry {error}") from error
    except (CheckpointError, RecipeError):
        raise
    except Exception as error:  # entries that no run wrote may make anything of their readers
        where = ".".join(map(str, entry)) or "state"
        said = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"ckpt_path: the checkpoint is damaged or another's: its entry {where} cannot be taken over "
            f"({type(error).__name__}: {said})"
        ) from error


def _count(value: Any, levels: int, left: int) -> int:
    """How many more values there may be after those within this one, which must not be too deep, nor claim memory."""
    if left <= 0:
        raise EntryError("is too long")
    left -= 1
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise EntryError("is a tensor of a kind that no checkpoint has")
        if value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise EntryError(f"is {_shown(value)}, of which the file holds only a part")
    elif isinstance(value, Mapping | list | tuple | set):
        if not levels:
            raise EntryError("is nested too deeply")
        for name, each in value.items() if isinstance(value, Mapping) else enumerate(value):
            with within(name):
                left = _count(each, levels - 1, left)
    return left


def _check_entries(checkpoint: dict[str, Any]) -> None:
    recipe, spaces, weights = checkpoint["recipe"], checkpoint["spaces"], checkpoint["state_dict"]
    for name in ("recipe", "spaces", "state_dict"):
        _require(isinstance(checkpoint[name], dict), checkpoint, name)
    _require(type(checkpoint["frames"]) is int and 0 <= checkpoint["frames"] < 2**63, checkpoint, "frames")
    for name in ("run_id", "matmul"):
        _require(isinstance(checkpoint.get(name), str | None), checkpoint, name)
    for name in ("model", "data"):
        _require(isinstance(recipe.get(name, {}), dict), recipe, name, "recipe")
    with within("recipe"):
        _count(recipe, DEEPEST, LONGEST)
        _require_data(recipe)
    for name, tensor in weights.items():
        _require(isinstance(name, str) and isinstance(tensor, Tensor), weights, name, "state_dict")
    _check_spaces(spaces)
    ranks = checkpoint.get("ranks", [])
    _require(isinstance(ranks, list), checkpoint, "ranks")
    for rank, own in enumerate(ranks):
        _require(isinstance(own, dict), ranks, rank, "ranks")
        for name in ("generators", "experience", "algorithm"):
            _require(isinstance(own.setdefault(name, {}), dict), own, name, "ranks", rank)


def _require_data(value: Any) -> None:
    """Check that a recipe is what YAML can say."""
    if isinstance(value, dict | list | tuple):
        for name, each in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, dict) and type(name) not in (str, int, float, bool):
                raise EntryError(f"has the key {_shown(name)}")
            with within(name):
                _require_data(each)
    elif isinstance(value, str) and (("&" in value and "*" in value) or len(value) > 10_000):
        raise EntryError(f"is {_shown(value)}, a text that may explode where it is read as YAML")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise EntryError(f"is {_shown(value)}")


def _check_spaces(spaces: dict[str, Any]) -> None:
    def numbers(value: Any) -> bool:
        return isinstance(value, tuple | list) and all(type(number) in (int, float) for number in value)

    def texts(value: Any) -> bool:
        return isinstance(value, tuple | list) and all(isinstance(text, str) for text in value)

    def size(value: Any, least: int = 0) -> bool:
        return type(value) is int and least <= value <= LARGEST

    wanted: dict[str, Callable[[Any], bool]] = {
        "observation": lambda value: (
            numbers(value) and 0 < len(value) < 9 and all(map(size, value)) and math.prod(value) <= LARGEST
        ),
        "actions": lambda value: size(value, 1),
        "discrete": lambda value: isinstance(value, bool),
        "low": lambda value: numbers(value) and len(value) in (0, spaces["actions"]),
        "high": lambda value: numbers(value) and len(value) == len(spaces["low"]),
        "horizon": lambda value: type(value) is int and 0 < value < 2**63,
        "trials": lambda value: isinstance(value, bool),
        "task": size,
        "tasks": texts,
        "missions": lambda value: isinstance(value, tuple | list) and all(map(texts, value)),
        "raw": lambda value: value is None or isinstance(value, dict),
    }
    for name in dict.fromkeys([*wanted, *spaces]):
        _require(name in wanted and name in spaces and wanted[name](spaces[name]), spaces, name, "spaces")
    if spaces["raw"] is None:
        return
    with within("spaces", "raw"):
        _require_data(spaces["raw"])
    try:
        for name in ("observation", "action"):
            _check_raw(spaces["raw"][name])
        shown, acted = (gym_spaces.rebuild(spaces["raw"][name]) for name in ("observation", "action"))
        fits = gym_spaces.observation_shape(shown)[0] == tuple(spaces["observation"])
        fits = fits and gym_spaces.choices(acted) is not None
    except Exception as error:  # sizes, bounds and types that no space has may make anything of it
        raise EntryError(f"describes no space ({error})", "spaces", "raw") from error
    if not fits:
        raise EntryError("describes other observations or actions than the other spaces", "spaces", "raw")


def _check_raw(plain: dict[str, Any]) -> None:
    """Check that a space is small before it is made."""
    for part in plain.get("spaces", ()):
        _check_raw(part if isinstance(part, dict) else part[1])
    for name in ("shape", "n"):
        held = plain.get(name, 1)
        if not 0 <= math.prod(held if isinstance(held, list) else [held]) <= LARGEST:
            raise EntryError(f"has {name} {_shown(held)}")


def _require(holds: bool, tree: Any, name: Any, *above: Any) -> None:
    if not holds:
        there = not isinstance(tree, Mapping) or name in tree
        raise EntryError(f"is {_shown(tree[name])}" if there else "is missing", *above, name)


def _shown(value: Any) -> str:
    """A value for a message, on one line."""
    if isinstance(value, Tensor):
        return f"a tensor of {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if value is None or isinstance(value, bool | float | str) or (type(value) is int and abs(value) < 2**64):
        return repr(value)[:60]
    return f"of type {type(value).__name__}"
