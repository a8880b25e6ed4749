"""The agent of meta-reinforcement learning: what acts, and what the losses differentiate."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from torchrl.envs.utils import ExplorationType, exploration_type

from lightning_hyper.modules.context import ContextFactory, Window, observed
from lightning_hyper.modules.normalization import RunningNorm
from lightning_hyper.modules.spaces import Spaces
from lightning_hyper.nn import Conditional, VectorEncoder

ConditionalFactory = Callable[[int, int, int], Conditional]
EncoderFactory = Callable[[int], VectorEncoder]

INPUTS = ("observation", "episode_done", "previous_action", "previous_reward", "is_init", "task")


class MetaAgent(TensorDictModuleBase):
    """Actor and critic, two conditional networks f(x | c) of one observation x and one context c.

    As a policy it reads one step `[num_envs, ...]`, writes `action`, `log_prob`, `state_value`, and replaces `hidden`
    `[num_envs, state_features]` by the state after the step. It samples, or takes the mode under
    `ExplorationType.DETERMINISTIC`.

    Args:
        spaces: sizes of the environment.
        context: makes the context source.
        actor: makes the network of logits, or of the mean of a Gaussian whose standard deviation is learned apart.
        critic: makes the network of values.
        encoder: makes an embedding of the observation, shared by actor and critic.
        normalize_observation: standardise x by running statistics; the context source sees it raw.
    """

    def __init__(
        self,
        spaces: Spaces,
        *,
        context: ContextFactory,
        actor: ConditionalFactory,
        critic: ConditionalFactory,
        encoder: EncoderFactory | None = None,
        normalize_observation: bool = True,
    ) -> None:
        super().__init__()
        self.in_keys = [*INPUTS]
        self.out_keys = ["action", "log_prob", "state_value", "hidden"]
        features = spaces.observation + 1
        self.norm: nn.Module = RunningNorm(features) if normalize_observation else nn.Identity()
        self.encoder: nn.Module = nn.Identity()
        if encoder is not None:
            self.encoder = encoder(features)
            features = self.encoder.out_features
        self.context = context(spaces)
        self.actor = actor(features, self.context.out_features, spaces.actions)
        self.critic = critic(features, self.context.out_features, 1)
        self.log_std = None if spaces.discrete else nn.Parameter(torch.zeros(spaces.actions))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        window = {key: tensordict.get(key).unsqueeze(1) for key in INPUTS}
        contexts, hidden = self.contexts(window, tensordict.get("hidden", None))
        x, c = self.inputs(window).squeeze(1), contexts.squeeze(1)
        policy = self.policy(x, c)
        action = policy.mode if exploration_type() == ExplorationType.DETERMINISTIC else policy.sample()
        tensordict.set("action", action)
        tensordict.set("log_prob", policy.log_prob(action))
        tensordict.set("state_value", self.value(x, c))
        tensordict.set("hidden", hidden)
        return tensordict

    @property
    def uses_task(self) -> bool:
        """Whether it has to be told the task."""
        return self.context.uses_task

    def inputs(self, window: Window) -> Tensor:
        """What actor and critic see of each step, `[num_envs, time, inputs]`."""
        return cast(Tensor, self.encoder(self.norm(observed(window))))

    def contexts(self, window: Window, hidden: Tensor | None, bptt: int | None = None) -> tuple[Tensor, Tensor]:
        """Context of each step, `[num_envs, time, context]`, and the hidden state after the window.

        Args:
            window: entries `[num_envs, time, ...]`.
            hidden: state before it, `[num_envs, state_features]`; None means fresh.
            bptt: steps after which the gradient through time is cut; None lets it through the whole window.
        """
        if bptt is None:
            return cast(tuple[Tensor, Tensor], self.context(window, hidden))
        contexts = []
        for start in range(0, window["is_init"].shape[1], bptt):
            part = {key: window[key][:, start : start + bptt] for key in INPUTS}
            c, hidden = self.context(part, None if hidden is None else hidden.detach())
            contexts.append(c)
        return torch.cat(contexts, 1), cast(Tensor, hidden)

    def policy(self, x: Tensor, c: Tensor) -> Distribution:
        """Distribution of actions, `[*B]`, for inputs and contexts `[*B, ...]`."""
        out = self.actor(x, c).float()
        if self.log_std is None:
            return Categorical(logits=out, validate_args=False)
        scale = self.log_std.exp().clamp_min(1e-6).expand_as(out)
        return Independent(Normal(out, scale, validate_args=False), 1, validate_args=False)

    def value(self, x: Tensor, c: Tensor) -> Tensor:
        """Values `[*B, 1]` for inputs and contexts `[*B, ...]`."""
        return cast(Tensor, self.critic(x, c)).float()

    def observe(self, window: Window) -> None:
        """Take a collected batch into the running statistics."""
        if isinstance(self.norm, RunningNorm):
            self.norm.update(observed(window))
        self.context.observe(window)
