"""Conditioned networks for reinforcement learning: hypernetworks, context and memory as swappable parts of a recipe.

The names below are imported when first used, so that `import lightning_hyper` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_hyper.agent import Agent, load

__all__ = ["Agent", "load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("lightning_hyper.agent"), name)
    raise AttributeError(f"module 'lightning_hyper' has no attribute {name!r}")
