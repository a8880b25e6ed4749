"""The agent of PPO: actor and critic over one encoding and one context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from torchrl.envs.utils import ExplorationType, exploration_type

from lightning_hyper.checks import RecipeError
from lightning_hyper.modules.context import FEATURES, ContextFactory, Contexts, Role, Window, make_context
from lightning_hyper.modules.observation import EncoderFactory, ObservationEncoder
from lightning_hyper.modules.spaces import Spaces

ConditionalFactory = Callable[[int, int, int], nn.Module]
State = Tensor | None


class ActorCritic(TensorDictModuleBase):
    """Actor and critic, networks f(x | c) of one observation x and one context c.

    With a decision layer x becomes f(x | c) first, as in arXiv 2306.10698. As a tensordict module it reads one step
    `[num_envs, ...]` with the state `context_state` `[num_envs, state_features]` of its context source, where that has
    one, writes `action`, `log_prob` and `state_value`, and replaces the state. It samples, or takes the mode under
    `ExplorationType.DETERMINISTIC`.

    Args:
        spaces: sizes of the environment.
        actor: makes the network of logits, or of the mean of a Gaussian whose standard deviation is learned apart, from
            (inputs, context, outputs).
        critic: makes the network of values.
        encoder: makes an encoder of the observation, shared by actor and critic, from its shape.
        context: makes the context source, or several which are joined; null for none.
        embedding: makes an embedding of the context, shared by all that it conditions, from its shape.
        decision: makes the decision layer, with as many outputs as inputs; null for none.
        normalize_observation: standardise observations by running statistics.

    Attributes:
        keep_states: whether a batch is to have the context source's state before each of its steps.

    Raises:
        RecipeError: a context that nothing is conditioned on, or a decision layer that ignores it.
    """

    keep_states = False

    def __init__(
        self,
        spaces: Spaces,
        *,
        actor: ConditionalFactory,
        critic: ConditionalFactory,
        encoder: EncoderFactory | None = None,
        context: ContextFactory | Sequence[ContextFactory] | None = None,
        embedding: EncoderFactory | None = None,
        decision: ConditionalFactory | None = None,
        normalize_observation: bool = False,
    ) -> None:
        super().__init__()
        self.observation = ObservationEncoder(spaces, encoder, normalize=normalize_observation)
        features = self.features = self.observation.out_features
        self.context = make_context(context, spaces, features)
        self.context_features = self.context.out_features if self.context is not None else 0
        self.embedding: nn.Module | None = None
        if embedding is not None:
            if self.context is None:
                raise RecipeError("model.embedding is given without model.context; there is nothing to embed")
            self.embedding = embedding((self.context_features,))
            self.context_features = int(self.embedding.out_features)
        self.decision: nn.Module | None = None
        if decision is not None:
            if self.context is None:
                raise RecipeError("model.decision is given without model.context; a decision layer is f(x | context)")
            self.decision = decision(features, self.context_features, features)
            if not uses_context(self.decision):
                name = type(self.decision).__name__
                raise RecipeError(f"model.decision: {name} as it is set ignores its context; take Concat or Hyper")
        self.actor = actor(features, self.context_features, spaces.actions)
        self.critic = critic(features, self.context_features, 1)
        if self.context is not None and not any(
            network is not None and uses_context(network) for network in (self.decision, self.actor, self.critic)
        ):
            raise RecipeError(
                "model.context is given, but neither model.actor, model.critic nor a model.decision is conditioned on "
                "it; take Concat or Hyper for them"
            )
        self.log_std = None if spaces.discrete else nn.Parameter(torch.zeros(spaces.actions))
        keys = [*self.observation.in_keys, *(self.context.in_keys if self.context is not None else ())]
        self.window_keys = list(dict.fromkeys(keys))
        self.in_keys = [*self.window_keys, *(["context_state"] if self.state_features else [])]
        self.out_keys = ["action", "log_prob", "state_value", *self.in_keys[len(self.window_keys) :]]

    @property
    def state_features(self) -> int:
        """Features of the state that the context source carries, 0 for none."""
        return self.context.state_features if self.context is not None else 0

    @property
    def told(self) -> bool:
        """Whether it has to be told the task."""
        return self.context is not None and self.context.told

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        chosen, state = self.act(tensordict, tensordict.get("context_state", None))
        for key, value in chosen.items():
            tensordict.set(key, value)
        return tensordict if state is None else tensordict.set("context_state", state)

    def act(self, step: Window, state: State) -> tuple[dict[str, Tensor], State]:
        """What it chooses for one step `[num_envs, ...]`, by name, and the state after it."""
        x, contexts, state = self.encode_step(step, state)
        policy, value = self.heads(x, contexts)
        action = policy.mode if exploration_type() == ExplorationType.DETERMINISTIC else policy.sample()
        return {"action": action, "log_prob": policy.log_prob(action), "state_value": value}, state

    def value_of(self, step: Window, state: State) -> Tensor:
        """Values `[num_envs, 1]` of a step that is not acted in, such as the last observation of a cut episode."""
        x, contexts, _ = self.encode_step(step, state)
        return self.heads(x, contexts)[1]

    def encode_step(self, step: Window, state: State) -> tuple[Tensor, Contexts, State]:
        """`encode` for one step `[num_envs, ...]`: x `[num_envs, features]` and contexts `[num_envs]`."""
        window = {key: step[key].unsqueeze(1) for key in self.window_keys}
        x, contexts, state = self.encode(window, state)
        return x.squeeze(1), contexts.flat(), state

    def encode(self, window: Window, state: State, role: Role = "decide") -> tuple[Tensor, Contexts, State]:
        """What actor and critic are given of a window: x `[num_envs, time, features]`, contexts, and the state after.

        Args:
            window: entries `[num_envs, time, ...]`.
            state: of the context source before it, `[num_envs, state_features]`; None means fresh.
            role: what the contexts are for.
        """
        x = cast(Tensor, self.observation(window))
        contexts, state = self.contexts(window, x, state, role)
        return x, contexts, state

    def contexts(self, window: Window, x: Tensor, state: State, role: Role = "decide") -> tuple[Contexts, State]:
        """Contexts of a window whose observations are encoded already, and the state after it."""
        if self.context is None:
            return Contexts(x[..., :0]), None
        entries = {key: window[key] for key in self.context.in_keys}
        contexts, state = self.context({**entries, FEATURES: x}, state, role)
        return contexts if self.embedding is None else contexts.map(self.embedding), state

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

    def update_statistics(self, window: Mapping[str, Tensor] | TensorDictBase) -> None:
        """Take a collected batch into the running statistics."""
        self.observation.update_statistics(window)
        if self.context is not None:
            self.context.update_statistics(window)


def uses_context(network: nn.Module) -> bool:
    """Whether a network f(x | c) depends on c; one that does not say is taken to."""
    return bool(getattr(network, "uses_context", True))
