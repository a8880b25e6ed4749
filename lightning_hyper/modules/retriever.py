"""Retrievers: what an episodic memory says that an observation is worth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hyper.memory import EpisodicMemory
from lightning_hyper.modules.agent import ConditionalFactory
from lightning_hyper.modules.task import DECIDE, RETRIEVE
from lightning_hyper.modules.task_agent import TaskAgent

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
    """Compares observations with those in a memory, each projected for its own task, and mixes the memory's values.

    Args:
        features: features of the encoder.
        context_features: features of a task's context.
        projection: makes the conditional network of queries and keys; null for the decision layer's in
            `AttentionRetriever`, for none in others.
        subset: entries drawn anew for each call, without replacement; null for all.
        tasks: attend to entries of `all` tasks, or of the observation's `own` alone.
        refresh: calls after which all keys are encoded again, in between those of new entries alone, all without
            gradients: for large memories. Null encodes at every call, with gradients (the paper).

    Raises:
        ValueError: an option out of range.
    """

    shares_decision = False

    def __init__(
        self,
        features: int,
        context_features: int,
        *,
        projection: ConditionalFactory | None = None,
        subset: int | None = 15,
        tasks: Literal["all", "own"] = "all",
        refresh: int | None = None,
    ) -> None:
        super().__init__()
        for key, value in (("subset", subset), ("refresh", refresh)):
            if value is not None and value < 1:
                raise ValueError(f"model.retriever.{key} is {value}; it must be at least 1, or null")
        if tasks not in ("all", "own"):
            raise ValueError(f"model.retriever.tasks is {tasks!r}; it must be 'all' or 'own'")
        self.projection = projection(features, context_features, features) if projection is not None else None
        self.subset, self.tasks, self.refresh = subset, tasks, refresh
        self.keys = torch.zeros(0, features)  # of each place in the memory, where they are kept between calls
        self.encoded = torch.zeros(0, dtype=torch.int64)  # the memory's stamps when they were
        self.calls = 0

    @abstractmethod
    def weigh(self, query: Tensor, key: Tensor, allowed: Tensor | None) -> Tensor:
        """Weights `[B, K]`, each row's sum 1, or 0 where it is allowed nothing.

        Args:
            query: `[B, features]`.
            key: `[K, features]`.
            allowed: which entries each row may attend to, `[B, K]`; None for all.
        """

    def forward(
        self,
        agent: TaskAgent,
        observation: Tensor,
        task: Tensor,
        mission: Tensor,
        memory: EpisodicMemory,
        *,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Recall | None]:
        """The decision layer's features `[B, features]`, and what the memory says; None while it is empty.

        Both come of one pass through the encoder, and where they share a network its weights are generated once.

        Args:
            agent: encodes and decides.
            observation: `[B, ...]`.
            task, mission: `[B]`.
            memory: is read, and drawn from.
            places: of the entries that are asked; a subset is drawn by default.
        """
        places = memory.draw(self.subset) if places is None else places
        if not len(places) or memory.entries is None:
            return agent.decide(agent.encoder(observation), mission), None
        n, asked = len(mission), mission
        held = memory.entries[places.to(mission.device)]
        if self.refresh is None:
            observation = torch.cat([observation, held["observation"]])
            asked = torch.cat([mission, held["mission"]])
        features = agent.encoder(observation)
        if self.projection is None and self.shares_decision and agent.decision is not None:
            roles = torch.cat([torch.full_like(mission, DECIDE), torch.full_like(asked, RETRIEVE)])
            rows, missions = torch.cat([features[:n], features]), torch.cat([mission, asked])
            both = agent.conditioned(agent.decision, rows, missions, roles)
            decided, projected = both[:n], both[n:]
        else:
            decided, projected = agent.decide(features[:n], mission), self._project(agent, features, asked)
        query = projected[:n]
        key = projected[n:] if self.refresh is None else self._kept(agent, memory, places)
        allowed = task.unsqueeze(1) == held["task"] if self.tasks == "own" else None
        known = torch.ones_like(task, dtype=torch.bool) if allowed is None else allowed.any(1)
        weights = self.weigh(query, key, allowed)
        return decided, Recall(weights @ held["value"], weights.amax(1), known, weights, places)

    def _project(self, agent: TaskAgent, features: Tensor, mission: Tensor) -> Tensor:
        network = agent.decision if self.projection is None and self.shares_decision else self.projection
        if network is None:
            return features
        return agent.conditioned(network, features, mission, torch.full_like(mission, RETRIEVE))

    def _kept(self, agent: TaskAgent, memory: EpisodicMemory, places: Tensor) -> Tensor:
        assert self.refresh is not None
        assert memory.entries is not None
        if not len(self.keys):
            self.keys = torch.zeros(memory.capacity, self.keys.shape[1], device=memory.entries["value"].device)
            self.encoded = torch.zeros(memory.capacity, dtype=torch.int64)
        if self.calls % self.refresh == 0:
            self.encoded.zero_()
        self.calls += 1
        stale = places[self.encoded[places] != memory.stamps[places]]
        with torch.no_grad():
            for part in stale.to(self.keys.device).split(CHUNK) if len(stale) else ():
                held = memory.entries[part]
                self.keys[part] = self._project(agent, agent.encoder(held["observation"]), held["mission"])
        self.encoded[stale] = memory.stamps[stale]
        return self.keys[places.to(self.keys.device)]

    def kept_keys(self) -> dict[str, Any]:
        """What is kept from call to call, for exact continuation."""
        return {"keys": self.keys.clone(), "encoded": self.encoded.clone(), "calls": self.calls}

    def restore_keys(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        """Continue from `kept_keys`."""
        self.keys, self.encoded, self.calls = state["keys"].to(device), state["encoded"], state["calls"]


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

    def __init__(
        self, features: int, context_features: int, *, heads: int = 1, scaled: bool = False, **options: Any
    ) -> None:
        super().__init__(features, context_features, **options)
        if heads < 1 or features % heads:
            raise ValueError(f"model.retriever.heads is {heads}; it must divide the encoder's {features} features")
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

    def __init__(
        self,
        features: int,
        context_features: int,
        *,
        k: int = 20,
        kernel: Literal["cosine", "inverse_distance"] = "cosine",
        **options: Any,
    ) -> None:
        super().__init__(features, context_features, **options)
        if k < 1:
            raise ValueError(f"model.retriever.k is {k}; it must be at least 1")
        if kernel not in ("cosine", "inverse_distance"):
            raise ValueError(f"model.retriever.kernel is {kernel!r}; it must be 'cosine' or 'inverse_distance'")
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
