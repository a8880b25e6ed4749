"""Policies with bounded continuous actions: what acts, and what off-policy losses differentiate."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torchrl.envs.utils import ExplorationType, exploration_type

from lightning_hyper.checks import RecipeError
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.modules.conditioned import ConditionalFactory, ConditionedPolicy, State
from lightning_hyper.modules.context import Contexts, Window


class BoundedPolicy(ConditionedPolicy):
    """A network f(x | c) of one observation x and one context c, whose outputs become an action between bounds.

    It writes `action` `[num_envs, actions]` in the environment's units; networks see actions scaled to [-1, 1].

    Args:
        spaces: sizes and bounds of the environment.
        actor: makes the network, from (inputs, context, outputs).
        options: as in `ConditionedPolicy`.

    Raises:
        RecipeError: actions are discrete or have no bounds.
    """

    outputs = 1  # numbers of the network for each dimension of the action
    trains_encoder = False  # the encoder learns from the policy's loss, the context source from the critics'

    def __init__(self, spaces: Spaces, actor: ConditionalFactory, **options: Any) -> None:
        super().__init__(spaces, **options)
        _require_bounds(spaces)
        low, high = torch.tensor(spaces.low), torch.tensor(spaces.high)
        self.is_unit = bool((low == -1).all() and (high == 1).all())
        self.register_buffer("centre", (low + high) / 2, persistent=False)
        self.register_buffer("reach", (high - low) / 2, persistent=False)
        self.actor = actor(self.features, self.context_features, self.outputs * spaces.actions)

    @abstractmethod
    def choose(self, x: Tensor, contexts: Contexts) -> Tensor:
        """Scaled actions `[*B, actions]` for inputs `[*B, features]`, drawn, or the most likely."""

    def act(self, step: Window, state: State) -> tuple[dict[str, Tensor], State]:
        x, contexts, state = self.encode_step(step, state)
        action = self.choose(x, contexts)
        return {"action": action if self.is_unit else self.centre + self.reach * action}, state

    def scaled(self, action: Tensor) -> Tensor:
        """Actions in the environment's units, brought to [-1, 1]."""
        return action if self.is_unit else cast(Tensor, (action - self.centre) / self.reach)


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
