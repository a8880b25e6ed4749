"""Policies with bounded continuous actions: what acts, and what off-policy losses differentiate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.envs.utils import ExplorationType, exploration_type

from lightning_hyper.checks import RecipeError
from lightning_hyper.modules.actor_critic import ConditionalFactory, State
from lightning_hyper.modules.context import FEATURES, ContextFactory, Contexts, Window, make_context
from lightning_hyper.modules.observation import EncoderFactory, ObservationEncoder, features_of
from lightning_hyper.modules.spaces import Spaces


class BoundedPolicy(TensorDictModuleBase, ABC):
    """A network f(x | c) of one observation x and one context c, whose outputs become an action between bounds.

    As a tensordict module it reads one step `[num_envs, ...]` with the state `context_state`
    `[num_envs, state_features]` of its context source, where that has one, writes `action` `[num_envs, actions]` in the
    environment's units, and replaces the state. Networks see actions scaled to [-1, 1].

    Args:
        spaces: sizes and bounds of the environment.
        actor: makes the network, from (inputs, context, outputs).
        encoder: makes an encoder of the observation from its shape; null leaves vectors as they are.
        context: makes the context source, or several which are joined; null for none.
        embedding: makes an embedding of the context from its shape.
        normalize_observation: standardise observations by running statistics.

    Raises:
        RecipeError: actions are discrete or have no bounds; an embedding of no context.
    """

    outputs = 1  # numbers of the network for each dimension of the action

    def __init__(
        self,
        spaces: Spaces,
        actor: ConditionalFactory,
        *,
        encoder: EncoderFactory | None = None,
        context: ContextFactory | Sequence[ContextFactory] | None = None,
        embedding: EncoderFactory | None = None,
        normalize_observation: bool = False,
    ) -> None:
        super().__init__()
        _require_bounds(spaces)
        low, high = torch.tensor(spaces.low), torch.tensor(spaces.high)
        self.is_unit = bool((low == -1).all() and (high == 1).all())
        self.register_buffer("centre", (low + high) / 2, persistent=False)
        self.register_buffer("reach", (high - low) / 2, persistent=False)
        self.observation = ObservationEncoder(spaces, encoder, normalize=normalize_observation)
        features = self.observation.out_features
        self.context = make_context(context, spaces, features)
        self.context_features = self.context.out_features if self.context is not None else 0
        self.embedding: nn.Module | None = None
        if embedding is not None:
            if self.context is None:
                raise RecipeError("model.embedding is given without model.context; there is nothing to embed")
            self.embedding = embedding((self.context_features,))
            self.context_features = features_of(self.embedding, (self.context_features,))
        self.actor = actor(features, self.context_features, self.outputs * spaces.actions)
        keys = [*self.observation.in_keys, *(self.context.in_keys if self.context is not None else ())]
        self.window_keys = list(dict.fromkeys(keys))
        states = ["context_state"] if self.state_features else []
        self.in_keys, self.out_keys = [*self.window_keys, *states], ["action", *states]

    @property
    def state_features(self) -> int:
        """Features of the state that the context source carries, 0 for none."""
        return self.context.state_features if self.context is not None else 0

    @property
    def told(self) -> bool:
        """Whether it has to be told the task."""
        return self.context is not None and self.context.told

    @abstractmethod
    def choose(self, x: Tensor, contexts: Contexts) -> Tensor:
        """Scaled actions `[*B, actions]` for inputs `[*B, features]`, drawn, or the most likely."""

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        chosen, state = self.act(tensordict, tensordict.get("context_state", None))
        tensordict.set("action", chosen["action"])
        return tensordict if state is None else tensordict.set("context_state", state)

    def act(self, step: Window, state: State) -> tuple[dict[str, Tensor], State]:
        """The `action` that it chooses for one step `[num_envs, ...]`, and the state after it."""
        x = self.observation(step)
        contexts = Contexts(x[..., :0])
        if self.context is not None:
            window = {key: step[key].unsqueeze(1) for key in self.context.in_keys}
            contexts, state = self.contexts(window, x.unsqueeze(1), state)
            contexts = contexts.flat()
        action = self.choose(x, contexts)
        return {"action": action if self.is_unit else self.centre + self.reach * action}, state

    def contexts(self, window: Window, x: Tensor, state: State) -> tuple[Contexts, State]:
        """Contexts of a window whose observations are encoded already, and the state after it.

        No gradient reaches the encoder from here: it learns from the policy's loss, the source from the critics'.
        """
        assert self.context is not None
        entries = {key: window[key] for key in self.context.in_keys}
        contexts, state = self.context({**entries, FEATURES: x.detach()}, state)
        return contexts if self.embedding is None else contexts.map(self.embedding), state

    def scaled(self, action: Tensor) -> Tensor:
        """Actions in the environment's units, brought to [-1, 1]."""
        return action if self.is_unit else cast(Tensor, (action - self.centre) / self.reach)

    def update_statistics(self, window: Window) -> None:
        """Take a collected batch into the running statistics."""
        self.observation.update_statistics(window)
        if self.context is not None:
            self.context.update_statistics(window)


class DeterministicPolicy(BoundedPolicy):
    """tanh of the network's output; exploration adds Gaussian noise.

    Args:
        spaces, actor, options: as in `BoundedPolicy`.
        noise: standard deviation of the exploration noise, in units of half the action's range.
    """

    def __init__(self, spaces: Spaces, actor: ConditionalFactory, *, noise: float, **options: Any) -> None:
        super().__init__(spaces, actor, **options)
        self.noise = noise

    def mode(self, x: Tensor, contexts: Contexts) -> Tensor:
        """Scaled actions `[*B, actions]` without noise."""
        return torch.tanh(contexts.condition(self.actor, x))

    def choose(self, x: Tensor, contexts: Contexts) -> Tensor:
        action = self.mode(x, contexts)
        if exploration_type() == ExplorationType.DETERMINISTIC:
            return action
        return (action + self.noise * torch.randn_like(action)).clamp(-1, 1)


class GaussianPolicy(BoundedPolicy):
    """tanh of a Gaussian whose mean and log standard deviation are the network's outputs (Haarnoja et al. 2018)."""

    outputs = 2
    LOG_STD = (-20.0, 2.0)

    def choose(self, x: Tensor, contexts: Contexts) -> Tensor:
        mean, log_std = self._moments(x, contexts)
        if exploration_type() == ExplorationType.DETERMINISTIC:
            return torch.tanh(mean)
        return torch.tanh(mean + log_std.exp() * torch.randn_like(mean))

    def sample(self, x: Tensor, contexts: Contexts) -> tuple[Tensor, Tensor]:
        """Scaled actions `[*B, actions]` with their log-density `[*B]` in [-1, 1]; differentiable."""
        mean, log_std = self._moments(x, contexts)
        noise = torch.randn_like(mean)
        raw = mean + log_std.exp() * noise
        # log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), which does not overflow
        squash = 2 * (math.log(2) - raw - F.softplus(-2 * raw))
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi) - squash
        return torch.tanh(raw), log_prob.sum(-1)

    def _moments(self, x: Tensor, contexts: Contexts) -> tuple[Tensor, Tensor]:
        mean, log_std = contexts.condition(self.actor, x).float().chunk(2, -1)
        return mean, log_std.clamp(*self.LOG_STD)


def _require_bounds(spaces: Spaces) -> None:
    if spaces.discrete or not spaces.low or not all(map(math.isfinite, (*spaces.low, *spaces.high))):
        kind = "discrete" if spaces.discrete else "unbounded"
        raise RecipeError(f"data.env has {kind} actions; model needs continuous actions between finite bounds")
    if not all(low < high for low, high in zip(spaces.low, spaces.high, strict=True)):
        raise RecipeError(
            f"data.env has actions from {list(spaces.low)} to {list(spaces.high)}; model needs room between the two"
        )
