"""Retrievers: what an episodic memory says that an observation is worth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hyper.checks import Count, RecipeError, Width, at, checked
from lightning_hyper.modules.conditioned import ConditionalFactory

CHUNK = 4096  # observations encoded at a time where no gradient is kept


@dataclass
class Recall:
    """What was retrieved for B observations out of K entries.

    Attributes:
        value: weighted values of the entries, `[B]`.
        confidence: largest weight, `[B]`.
        known: whether any entry was there to be attended to, `[B]`.
        weights: `[B, K]`.
        places: places in the memory of the K entries.
    """

    value: Tensor
    confidence: Tensor
    known: Tensor
    weights: Tensor
    places: Tensor


class Retriever(nn.Module, ABC):
    """Compares queries with keys, and mixes the values of a memory's entries.

    Args:
        features: features of the encoder.
        context_features: features of the context.
        projection: makes the conditional network of queries and keys; null for the decision layer's in
            `AttentionRetriever`, for none in others.
        subset: entries drawn anew for each call, without replacement; null for all.
        tasks: attend to entries of `all` tasks, or of the observation's `own` alone.
        refresh: calls after which all keys are encoded again, in between those of new entries alone, all without
            gradients: for large memories. Null encodes at every call, with gradients (the paper).

    Raises:
        RecipeError: an option out of range.
    """

    shares_decision = False

    @checked
    def __init__(
        self,
        features: int,
        context_features: int,
        *,
        projection: ConditionalFactory | None = None,
        subset: Count | None = 15,
        tasks: Literal["all", "own"] = "all",
        refresh: Count | None = None,
    ) -> None:
        super().__init__()
        with at("projection"):
            self.projection = projection(features, context_features, features) if projection is not None else None
        self.subset, self.tasks, self.refresh = subset, tasks, refresh

    @abstractmethod
    def weigh(self, query: Tensor, key: Tensor, allowed: Tensor | None) -> Tensor:
        """Weights `[B, K]`, each row's sum 1, or 0 where it is allowed nothing.

        Args:
            query: `[B, features]`.
            key: `[K, features]`.
            allowed: which entries each row may attend to, `[B, K]`; None for all.
        """

    def recall(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, places: Tensor) -> Recall:
        """What entries with keys `[K, features]` and values `[K]` at `places` say to queries `[B, features]`."""
        known = query.new_ones(len(query), dtype=torch.bool) if allowed is None else allowed.any(1)
        weights = self.weigh(query, key, allowed)
        return Recall(weights @ value, weights.amax(1), known, weights, places)


class KeyCache:
    """Keys of a memory's entries that are kept between calls.

    Args:
        capacity: places of the memory.
        features: features of a key.
        refresh: calls after which all keys are made again; None keeps none.
    """

    def __init__(self, capacity: int, features: int, refresh: int | None) -> None:
        self.refresh, self.calls = refresh, 0
        self._keys = torch.zeros(capacity if refresh is not None else 0, features)
        self._made = torch.zeros(len(self._keys), dtype=torch.int64)  # the memory's stamps when they were made

    @torch.no_grad()
    def keys(self, places: Tensor, stamps: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """Keys `[K, features]` of the entries at `places`, made anew where they are due or their entry is new.

        Args:
            places: in the memory, `[K]`.
            stamps: when each place of the memory was written.
            make: keys of the entries at some places.
        """
        assert self.refresh is not None
        if self.calls % self.refresh == 0:
            self._made.zero_()
        self.calls += 1
        stale = places[self._made[places] != stamps[places]]
        for some in stale.split(CHUNK) if len(stale) else ():
            made = make(some)
            self._keys = self._keys.to(made.device)
            self._keys[some.to(made.device)] = made
        self._made[stale] = stamps[stale]
        return self._keys[places.to(self._keys.device)]

    def save_state(self) -> dict[str, Any]:
        """Everything, as plain tensors."""
        return {"keys": self._keys.clone(), "made": self._made.clone(), "calls": self.calls}

    def load_state(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        """Continue from `save_state`."""
        self._keys, self._made, self.calls = state["keys"].to(device), state["made"].clone(), state["calls"]


class AttentionRetriever(Retriever):
    """Attention of the projected observation to the projected entries.

    Without a projection of its own it uses the decision layer's network, told that its role is to retrieve.

    Args:
        features, context_features, options: as in `Retriever`.
        heads: parts of the features that attend apart; their weights are averaged.
        scaled: divide scores by the root of a head's features.

    Source: arXiv 2306.10698 (one head, unscaled).
    """

    shares_decision = True

    @checked
    def __init__(
        self, features: int, context_features: int, *, heads: Width = 1, scaled: bool = False, **options: Any
    ) -> None:
        super().__init__(features, context_features, **options)
        if features % heads:
            raise RecipeError(f"heads is {heads}; it must divide the encoder's {features} features")
        self.heads, self.scale = heads, (features / heads) ** -0.5 if scaled else 1.0

    def weigh(self, query: Tensor, key: Tensor, allowed: Tensor | None) -> Tensor:
        q, k = (x.unflatten(-1, (self.heads, -1)).transpose(0, 1) for x in (query * self.scale, key))
        scores = (q @ k.transpose(1, 2)).float()
        if allowed is None:
            weights = scores.softmax(-1)
        else:
            weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).masked_fill(~allowed, 0)
        return cast(Tensor, weights.mean(0) if self.heads > 1 else weights[0])


class NearestRetriever(Retriever):
    """The k nearest entries of each observation, as the encoder sees them or projected.

    Args:
        features, context_features, options: as in `Retriever`.
        k: entries that count.
        kernel: `cosine`: nearest by cosine, weights the softmax of cosines (an earlier form of arXiv 2306.10698's
            code, with k = 20); `inverse_distance`: nearest by distance, weights 1 / (squared distance + 0.001)
            (Neural Episodic Control, Pritzel et al. 2017).
    """

    DELTA = 1e-3

    @checked
    def __init__(
        self,
        features: int,
        context_features: int,
        *,
        k: Count = 20,
        kernel: Literal["cosine", "inverse_distance"] = "cosine",
        **options: Any,
    ) -> None:
        super().__init__(features, context_features, **options)
        self.k, self.kernel = k, kernel

    def weigh(self, query: Tensor, key: Tensor, allowed: Tensor | None) -> Tensor:
        if self.kernel == "cosine":
            nearness = F.normalize(query.float(), dim=-1) @ F.normalize(key.float(), dim=-1).T
        else:
            nearness = -torch.cdist(query.float(), key.float()).square()
        if allowed is not None:
            nearness = nearness.masked_fill(~allowed, -torch.inf)
        near, which = nearness.topk(min(self.k, len(key)), dim=-1)
        if self.kernel == "cosine":
            weights = near.softmax(-1)
        else:
            weights = 1 / (self.DELTA - near)
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.masked_fill(near.isinf(), 0)
        return torch.zeros_like(nearness).scatter(1, which, weights)


RetrieverFactory = Callable[[int, int], Retriever]
