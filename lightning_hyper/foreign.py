"""What a recipe may name that comes with a file, and so is not the caller's own."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from threading import RLock
from typing import Any

import gymnasium
from jsonargparse import Namespace, _common, _optionals
from torch import nn as torch_nn

from lightning_hyper import algorithms, envs, experience, memory, modules, nn, objectives

ROOMS = (envs, experience, memory, modules, nn, objectives, algorithms)
KINDS = (
    *(torch_nn.Module, envs.BatchedEnv, experience.Experience),
    *(memory.EpisodicMemory, memory.Rule, objectives.Alpha),
)
# Where Gymnasium's environments are defined that come with it, or with the packages that this one names.
PACKAGES = ("gymnasium.envs.", "minigrid.", "ale_py.")
# Wrappers that only change what is seen, done or counted.
WRAPPERS = {
    f"gymnasium.wrappers.{name}"
    for name in (
        *("AtariPreprocessing", "ClipAction", "ClipReward", "FilterObservation", "FlattenObservation"),
        *("FrameStackObservation", "GrayscaleObservation", "MaxAndSkipObservation", "NormalizeObservation"),
        *("RescaleAction", "ResizeObservation", "StickyAction", "TimeAwareObservation", "TimeLimit"),
    )
}
_lock = RLock()


@cache
def own_parts() -> frozenset[str]:
    """Paths of the classes that every recipe may name: the parts that are defined in this package, and PyTorch's."""
    found = {f"torch.nn.{name}": cls for name, cls in vars(torch_nn).items() if _is_of(cls, ("torch.nn.modules.",))}
    rooms = tuple(f"{room.__name__}." for room in ROOMS)
    for module in [module for name, module in sys.modules.items() if f"{name}.".startswith(rooms)]:
        found |= {f"{module.__name__}.{name}": cls for name, cls in vars(module).items() if _is_of(cls, rooms)}
    return frozenset(found) | {f"{cls.__module__}.{cls.__qualname__}" for cls in found.values()}


def _is_of(value: Any, modules_of: tuple[str, ...]) -> bool:
    return inspect.isclass(value) and value.__module__.startswith(modules_of) and issubclass(value, KINDS)


@contextmanager
def limited(trust: Sequence[str] = ()) -> Iterator[None]:
    """Within, jsonargparse imports only our own parts and what is trusted, and takes no string for a file to read.

    Args:
        trust: modules, packages or classes.
    """
    settings = _common.parsing_settings
    with _lock:
        kept, mode = dict(settings), _optionals._config_read_mode
        settings["import_path_verdicts"] = {"*": False, **dict.fromkeys((*own_parts(), *trust), True)}
        settings["import_paths_enforced"] = True
        settings["instantiate_subclass_spec_in_any"] = False
        _optionals._config_read_mode = "fF"  # a file that is none
        try:
            yield
        finally:
            settings.update(kept)
            _optionals._config_read_mode = mode


def foreign(config: Any, trust: Sequence[str] = ()) -> str | None:
    """What a parsed recipe names that is neither ours nor trusted; None where there is nothing."""
    for node in _nodes(config):
        if callable(node) and not isinstance(node, Namespace):
            where = f"{getattr(node, '__module__', '')}.{getattr(node, '__qualname__', type(node).__qualname__)}"
            if not trusted(where, trust):
                return where
        if not isinstance(node, Namespace | Mapping) or "class_path" not in node:
            continue
        path, given = str(node["class_path"]), node.get("init_args") or {}
        if path not in own_parts() | WRAPPERS and not trusted(path, trust):
            return path
        if path.endswith(".Gym") and path in own_parts() and (name := _foreign_env(given, trust)):
            return name
        if path.endswith(".TextContext") and path in own_parts():
            encoder = given.get("encoder", "all-MiniLM-L6-v2")
            if encoder != "all-MiniLM-L6-v2" and encoder not in trust:
                return str(encoder)
    return None


def trusted(path: str, trust: Sequence[str]) -> bool:
    """Whether a path is, or lies in, something that is trusted."""
    return f"{path}.".startswith(tuple(f"{name}." for name in trust))


def _foreign_env(given: Any, trust: Sequence[str]) -> str | None:
    """What a `Gym` would import that is not trusted: a module, a wrapper, or an environment that someone registered."""
    name = str(given.get("id"))
    module, _, plain = name.rpartition(":")
    spec = gymnasium.registry.get(plain)
    entry = spec.entry_point if spec else None
    where = entry.replace(":", ".") if isinstance(entry, str) else f"{getattr(entry, '__module__', '')}."
    if module and not trusted(module, trust):
        return name
    if entry is not None and not module and not where.startswith(PACKAGES) and not trusted(where, trust):
        return name
    for wrapper in given.get("wrappers") or ():
        path = str(wrapper.get("class_path") if isinstance(wrapper, Mapping | Namespace) else wrapper)
        if path not in WRAPPERS and not trusted(path, trust):
            return path
    return None


def _nodes(tree: Any) -> Iterator[Any]:
    yield tree
    if isinstance(tree, Namespace):
        tree = vars(tree)
    for branch in tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list | tuple | set) else ():
        yield from _nodes(branch)
