"""The agent of PPO: actor and critic over one encoding and one context."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from torchrl.envs.utils import ExplorationType, exploration_type

from lightning_hyper.checks import RecipeError, at
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.modules.conditioned import ConditionalFactory, ConditionedPolicy, State, uses_context
from lightning_hyper.modules.context import Contexts, Window


class ActorCritic(ConditionedPolicy):
    """Actor and critic, networks f(x | c) of one observation x and one context c.

    With a decision layer x becomes f(x | c) first, as in arXiv 2306.10698. It writes `action`, `log_prob` `[num_envs]`
    and `state_value` `[num_envs, 1]`.

    Args:
        spaces: sizes of the environment.
        actor: makes the network of logits, or of the mean of a Gaussian whose standard deviation is learned apart, from
            (inputs, context, outputs).
        critic: makes the network of values.
        decision: makes the decision layer, with as many outputs as inputs; null for none.
        options: as in `ConditionedPolicy`.

    Raises:
        RecipeError: a context that nothing is conditioned on, or a decision layer that ignores it.
    """

    choices = ("action", "log_prob", "state_value")

    def __init__(
        self,
        spaces: Spaces,
        *,
        actor: ConditionalFactory,
        critic: ConditionalFactory,
        decision: ConditionalFactory | None = None,
        **options: Any,
    ) -> None:
        super().__init__(spaces, **options)
        features, context = self.features, self.context_features
        self.decision: nn.Module | None = None
        if decision is not None:
            if self.context is None:
                raise RecipeError("model.decision is given without model.context; a decision layer is f(x | context)")
            with at("model.decision"):
                self.decision = decision(features, context, features)
            if not uses_context(self.decision):
                name = type(self.decision).__name__
                raise RecipeError(f"model.decision: {name} as it is set ignores its context; take Concat or Hyper")
        with at("model.actor"):
            self.actor = actor(features, context, spaces.actions)
        with at("model.critic"):
            self.critic = critic(features, context, 1)
        if self.context is not None and not any(
            network is not None and uses_context(network) for network in (self.decision, self.actor, self.critic)
        ):
            raise RecipeError(
                "model.context is given, but neither model.actor, model.critic nor a model.decision is conditioned on "
                "it; take Concat or Hyper for them"
            )
        self.log_std = None if spaces.discrete else nn.Parameter(torch.zeros(spaces.actions))

    def act(self, step: Window, state: State) -> tuple[dict[str, Tensor], State]:
        x, contexts, state = self.encode_step(step, state)
        policy, value = self.heads(x, contexts)
        action = policy.mode if exploration_type() == ExplorationType.DETERMINISTIC else policy.sample()
        return {"action": action, "log_prob": policy.log_prob(action), "state_value": value}, state

    def value_of(self, step: Window, state: State) -> Tensor:
        """Values `[num_envs, 1]` of a step that is not acted in, such as the last observation of a cut episode."""
        x, contexts, _ = self.encode_step(step, state)
        return self.heads(x, contexts)[1]

    def decide(self, x: Tensor, contexts: Contexts) -> Tensor:
        """Inputs of the heads `[*B, features]`: x, or what the decision layer makes of it."""
        return x if self.decision is None else contexts.condition(self.decision, x)

    def heads(self, x: Tensor, contexts: Contexts) -> tuple[Distribution, Tensor]:
        """Distribution of actions `[*B]` and values `[*B, 1]`."""
        return self.heads_of(self.decide(x, contexts), contexts)

    def heads_of(self, decided: Tensor, contexts: Contexts) -> tuple[Distribution, Tensor]:
        """`heads` after the decision layer."""
        out = contexts.condition(self.actor, decided).float()
        value = contexts.condition(self.critic, decided).float()
        if self.log_std is None:
            return Categorical(logits=out, validate_args=False), value
        scale = self.log_std.exp().clamp_min(1e-6).expand_as(out)
        return Independent(Normal(out, scale, validate_args=False), 1, validate_args=False), value
