"""PPO whose value loss listens to an episodic memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from lightning_hyper.algorithms.ppo import PPO
from lightning_hyper.checkpoint_file import within
from lightning_hyper.checks import RecipeError, at, checked
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.memory import EpisodeRecorder, EpisodicMemory
from lightning_hyper.modules.context import Contexts, Role, chained
from lightning_hyper.modules.retriever import KeyCache, Recall, RetrieverFactory
from lightning_hyper.objectives import Alpha, DynamicAlpha


class RetrievalPPO(PPO):
    """PPO with task-adaptive retrieval, over any context.

    Completed episodes enter a memory; a retriever compares each observation with the memory's, both projected by a
    network f(x | c) whose context is told that its role is to retrieve, and mixes their values into V_mem; the value
    loss is (1 - alpha) (V - R)^2 + alpha (V - V_mem)^2. Acting, returns and advantages know nothing of the memory.

    An entry keeps the state that the context source had before it, from which its context is made again.

    Args:
        retriever: makes the retriever from the features of the encoder and of the context.
        memory: the episodic memory; each rank has one of its own experience.
        alpha: the rule for alpha.
        options: as in `PPO`.

    Raises:
        RecipeError: by `build`, a retriever that does not fit the memory, the context or the environment.

    Source: arXiv 2306.10698.
    """

    @checked
    def __init__(
        self, *, retriever: RetrieverFactory, memory: EpisodicMemory, alpha: Alpha | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.make_retriever, self.memory, self.alpha = retriever, memory, alpha or DynamicAlpha()

    def build(self, spaces: Spaces) -> None:
        super().build(spaces)
        agent = self.agent
        agent.keep_states = bool(agent.state_features)
        with at("model.retriever"):
            self.retriever = self.make_retriever(agent.features, agent.context_features)
        if self.retriever.projection is not None and agent.context is None:
            raise RecipeError("model.retriever.projection needs a context: name a model.context")
        if self.retriever.tasks == "own" and not spaces.tasks:
            raise RecipeError("model.retriever.tasks is 'own', but data.env shows no tasks that are an index")
        if self.retriever.subset is not None and self.retriever.subset > self.memory.capacity:
            raise RecipeError(
                f"model.memory.capacity is {self.memory.capacity}, below the {self.retriever.subset} entries of "
                "model.retriever.subset"
            )
        keys = dict.fromkeys([*agent.window_keys, *(["task"] if spaces.tasks else []), "state_value"])
        kept = [*keys, *(["context_state"] if agent.keep_states else [])]
        self.recorder = EpisodeRecorder(self.gamma, kept, bootstrap=self.bootstrap_truncation)
        self.cache = KeyCache(self.memory.capacity, agent.features, self.retriever.refresh)
        self.memory.begin(spaces, torch.initial_seed(), kept)

    def improve(self, batch: TensorDict) -> list[dict[str, Tensor]]:
        self.memory.insert(self.recorder.completed(batch))
        updates = super().improve(batch)
        held = torch.tensor(float(len(self.memory)), device=self.device)
        return [{**update, "memory_size": held} for update in updates]

    def estimate(self, batch: TensorDict) -> dict[str, Tensor]:
        own = {"task": batch["task"]} if self.retriever.tasks == "own" else {}
        return {**super().estimate(batch), **own}

    def losses(self, part: dict[str, Tensor]) -> dict[str, Tensor]:
        decided, contexts, recall = self.recall(part)
        heads = self.agent.heads_of(decided, contexts)
        if recall is None:
            losses = self._compare(*heads, *self.targets(part))
            # DDP reduces every parameter in every backward, also on a rank whose memory is still empty.
            idle = [0.0 * parameter.sum() for parameter in self.retriever.parameters()]
            return {**losses, "total": losses["total"] + sum(idle)}
        alpha = self.alpha(recall.confidence, self.clock.progress) * recall.known
        targets = self.targets(part)
        losses = self._compare(*heads, *targets, (recall.value, alpha))
        error = (recall.value.detach() - targets[-1]).square().mean()
        return {**losses, "alpha": alpha.mean(), "memory_error": error}

    def recall(self, part: dict[str, Tensor], places: Tensor | None = None) -> tuple[Tensor, Contexts, Recall | None]:
        """What the heads are given of a minibatch, and what the memory says of it.

        Observations and entries go through the encoder together, and where decision layer and projection are one
        network its weights are generated once.

        Args:
            part: a minibatch, as `minibatched` gives it.
            places: of the entries that are asked; a subset is drawn by default.

        Returns:
            features of the decision layer `[B, features]`, their contexts, and the recall; None with an empty memory.
        """
        agent, memory, rows = self.agent, self.memory, part.get("rows")
        places = memory.draw(self.retriever.subset) if places is None else places
        held = memory.at(places) if len(places) else None
        x, remembered = self._encoded(part, held if self.cache.refresh is None else None)
        contexts = self._contexts(part, x, "decide")
        if held is None:
            x = self.flat(x, rows)
            return agent.decide(x, contexts), contexts, None
        network = self.retriever.projection
        if network is None and self.retriever.shares_decision:
            network = agent.decision
        roles = agent.context is not None and agent.context.has_roles
        if remembered is None:
            asking = self._contexts(part, x, "retrieve") if roles else contexts
            x = self.flat(x, rows)
            decided = agent.decide(x, contexts)
            query = x if network is None else asking.condition(network, x)
            key = self.cache.keys(places, memory.stamps, lambda some: self._key(network, some))
        elif network is None:
            x = self.flat(x, rows)
            decided, query, key = agent.decide(x, contexts), x, remembered
        else:
            retrieving = self._retrieving(part, x, held, remembered, None if roles else contexts)
            x = self.flat(x, rows)
            both = torch.cat([x, remembered])
            if network is agent.decision and roles:
                decided, projected = _together(network, [(contexts, x), (retrieving, both)])
            else:
                projected = retrieving.condition(network, both)
                decided = projected[: len(x)] if network is agent.decision else agent.decide(x, contexts)
            query, key = projected.split([len(x), len(remembered)])
        allowed = None
        if self.retriever.tasks == "own":
            allowed = self.flat(part["task"], rows).unsqueeze(1) == held["task"]
        return decided, contexts, self.retriever.recall(query, key, held["value"], allowed, places)

    def _encoded(self, part: dict[str, Tensor], held: TensorDict | None) -> tuple[Tensor, Tensor | None]:
        """What the encoder makes of a minibatch `[n, time, features]`, and of entries `[K, features]` with it."""
        shape = part[self.agent.window_keys[0]].shape[:2]
        seen = {key: part[key].flatten(0, 1) for key in self.agent.observation.in_keys}
        if held is not None:
            seen = {key: torch.cat([entry, held[key]]) for key, entry in seen.items()}
        features = self.agent.observation(seen)
        x = features[: shape.numel()].view(*shape, -1)
        return x, None if held is None else features[shape.numel() :]

    def _contexts(self, part: dict[str, Tensor], x: Tensor, role: Role) -> Contexts:
        """Contexts of the steps `[B]` of a minibatch in a role."""
        return self.agent.contexts(part, x, part.get("context_state"), role)[0].flat(part.get("rows"))

    def _retrieving(
        self, part: dict[str, Tensor], x: Tensor, held: TensorDict, remembered: Tensor, known: Contexts | None
    ) -> Contexts:
        """Contexts to retrieve of a minibatch's steps, unless they are known, and then of the entries, `[B + K]`."""
        agent = self.agent
        if agent.context is None or agent.state_features:
            return chained(known or self._contexts(part, x, "retrieve"), self._contexts_of(held, remembered))
        # Asked for together, so that what they share is made once.
        window = {key: torch.cat([part[key].flatten(0, 1), held[key]]).unsqueeze(1) for key in agent.context.in_keys}
        features = torch.cat([x.flatten(0, 1), remembered]).unsqueeze(1)
        return agent.contexts(window, features, None, "retrieve")[0].flat()

    def _contexts_of(self, held: TensorDict, x: Tensor) -> Contexts:
        window = {key: held[key].unsqueeze(1) for key in self.agent.window_keys}
        state = held["context_state"] if self.agent.keep_states else None
        return self.agent.contexts(window, x.unsqueeze(1), state, "retrieve")[0].flat()

    def _key(self, network: nn.Module | None, places: Tensor) -> Tensor:
        held = self.memory.at(places)
        x = self.agent.observation(held)
        return x if network is None else self._contexts_of(held, x).condition(network, x)

    def save_state(self) -> dict[str, Any]:
        return {
            **super().save_state(),
            "memory": self.memory.save_state(),
            "recorder": self.recorder.save_state(),
            "keys": self.cache.save_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        with self.taken_over():
            with within("memory"):
                self.memory.load_state(state["memory"], self.device)
            with within("recorder"):
                self.recorder.load_state(state["recorder"], self.device)
            self.cache.load_state(state["keys"], self.device)


def _together(network: nn.Module, parts: Sequence[tuple[Contexts, Tensor]]) -> Sequence[Tensor]:
    """f(x | c) of several contexts and inputs, in one call."""
    contexts, rows = reduce(chained, [contexts for contexts, _ in parts]), torch.cat([x for _, x in parts])
    return list(contexts.condition(network, rows).split([len(x) for _, x in parts]))
