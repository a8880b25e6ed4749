"""Several context sources side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lightning_hyper.checks import RecipeError, at
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.modules.context import (
    ContextFactories,
    ContextFactory,
    Contexts,
    ContextSource,
    InferredContext,
    Role,
    Window,
)
from lightning_hyper.modules.task_context import IndexedContext


class JoinedContext(ContextSource):
    """Several sources side by side.

    Args:
        spaces: sizes of the environment.
        features: features of the agent's encoder.
        parts: make the sources.
    """

    def __init__(self, spaces: Spaces, features: int, *, parts: Sequence[ContextFactory]) -> None:
        super().__init__()
        if not parts:
            raise RecipeError("model.context is an empty list; name one source or more")
        self.parts = nn.ModuleList()
        for k, part in enumerate(parts):
            with at(str(k)):
                self.parts.append(part(spaces, features))
        self.out_features = sum(part.out_features for part in self.sources)
        self.state_features = sum(part.state_features for part in self.sources)
        self.in_keys = list(dict.fromkeys(key for part in self.sources for key in part.in_keys))
        self.told = any(part.told for part in self.sources)
        self.has_roles = any(part.has_roles for part in self.sources)
        self._indexed = [part for part in self.sources if isinstance(part, IndexedContext)]
        self._missions = sum(map(len, spaces.missions))

    @property
    def sources(self) -> list[ContextSource]:
        """The parts."""
        return [cast(ContextSource, part) for part in self.parts]

    def forward(self, window: Window, state: Tensor | None, role: Role = "decide") -> tuple[Contexts, Tensor | None]:
        if len(self._indexed) == len(self.parts):
            return self._joined_index(window, role), None
        sizes = [part.state_features for part in self.sources]
        states = [None] * len(sizes) if state is None else state.split(sizes, -1)
        given, after = [], []
        for part, before in zip(self.sources, states, strict=True):
            contexts, left = part(window, before if part.state_features else None, role)
            given.append(contexts.each())
            after += [] if left is None else [left]
        return Contexts(torch.cat(given, -1)), torch.cat(after, -1) if after else None

    def _joined_index(self, window: Window, role: Role) -> Contexts:
        keys = {part.key for part in self._indexed}
        if len(keys) == 1:
            distinct, index = torch.unique(window[next(iter(keys))], return_inverse=True)
            which = dict.fromkeys(keys, distinct)
        else:
            pairs = window["task"] * self._missions + window["mission"]
            distinct, index = torch.unique(pairs, return_inverse=True)
            which = {"task": distinct // self._missions, "mission": distinct % self._missions}
        return Contexts(torch.cat([part.values(which[part.key], role) for part in self._indexed], -1), index)

    def update_statistics(self, window: Window) -> None:
        state, sizes = window.get("context_state", None), [part.state_features for part in self.sources]
        states = [None] * len(sizes) if state is None else state.split(sizes, -1)
        for part, own in zip(self.sources, states, strict=True):
            entries = {key: window[key] for key in part.in_keys}
            part.update_statistics(entries if own is None else {**entries, "context_state": own})

    @property
    def inferred(self) -> InferredContext | None:
        found = [part.inferred for part in self.sources if part.inferred is not None]
        if len(found) > 1:
            raise RecipeError("model.context has two sources with objectives of their own; keep one of them")
        return found[0] if found else None


def make_context(context: ContextFactories, spaces: Spaces, features: int) -> ContextSource | None:
    """The source that a recipe names; several in a list are joined, null is none."""
    if context is None or callable(context):
        return None if context is None else context(spaces, features)
    return JoinedContext(spaces, features, parts=context)
