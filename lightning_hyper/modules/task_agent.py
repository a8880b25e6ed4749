"""The agent of multi-task reinforcement learning: one encoder for all tasks, conditioned on which of them it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch.distributions import Categorical
from torchrl.envs.utils import ExplorationType, exploration_type

from lightning_hyper.modules.agent import ConditionalFactory
from lightning_hyper.modules.spaces import Spaces
from lightning_hyper.modules.task import DECIDE, ROLES, TaskFactory, TaskSource, by_context
from lightning_hyper.nn import MLP, Conditional, GridEncoder

GridEncoderFactory = Callable[[tuple[int, ...]], GridEncoder]
HeadFactory = Callable[[int, int], MLP]


class TaskAgent(TensorDictModuleBase):
    """Encoder, decision layer f(features | task), and on top of it actor and critic.

    As a policy it reads one step `[num_envs, ...]` and writes `action`, `log_prob`, `state_value`. It samples, or
    takes the mode under `ExplorationType.DETERMINISTIC`.

    Args:
        spaces: sizes of the environment.
        encoder: makes the encoder from the shape of an observation.
        actor: makes the network of logits from the decision layer's features.
        critic: makes the network of values.
        task: makes the task source; null for an agent that is not told its task.
        decision: makes the decision layer, a conditional network with as many outputs as inputs; null for none.

    Raises:
        ValueError: actions are no index, observations are no grid, or a decision layer has no task.

    Source: arXiv 2306.10698.
    """

    def __init__(
        self,
        spaces: Spaces,
        *,
        encoder: GridEncoderFactory,
        actor: HeadFactory,
        critic: HeadFactory,
        task: TaskFactory | None = None,
        decision: ConditionalFactory | None = None,
    ) -> None:
        super().__init__()
        if not spaces.discrete or not spaces.image or not spaces.missions:
            raise ValueError(
                "data.env: model needs actions that are an index, observations that are a grid, and tasks with "
                "missions, as MiniGrid has"
            )
        if (task is None) != (decision is None):
            given, missing = ("task", "decision") if decision is None else ("decision", "task")
            raise ValueError(f"model.{given} is given without model.{missing}; give both or neither")
        self.in_keys, self.out_keys = ["observation", "mission"], ["action", "log_prob", "state_value"]
        self.encoder = encoder(spaces.image)
        self.features = self.encoder.out_features
        self.task: TaskSource | None = task(spaces) if task is not None else None
        self.decision: Conditional | None = None
        if decision is not None:
            assert self.task is not None
            self.decision = decision(self.features, self.task.out_features, self.features)
        self.actor = actor(self.features, spaces.actions)
        self.critic = critic(self.features, 1)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        decided = self.decide(self.encoder(tensordict.get("observation")), tensordict.get("mission"))
        policy = self.policy(decided)
        action = policy.mode if exploration_type() == ExplorationType.DETERMINISTIC else policy.sample()
        tensordict.set("action", action)
        tensordict.set("log_prob", policy.log_prob(action))
        tensordict.set("state_value", self.value(decided))
        return tensordict

    def decide(self, features: Tensor, mission: Tensor) -> Tensor:
        """Features `[B, features]` as the decision layer of each row's mission `[B]` has them."""
        if self.decision is None:
            return features
        return self.conditioned(self.decision, features, mission, torch.full_like(mission, DECIDE))

    def conditioned(self, network: Conditional, x: Tensor, mission: Tensor, role: Tensor) -> Tensor:
        """f(x | context of the mission in a role), `[B, out]`, for x `[B, in]`, missions and roles `[B]`."""
        assert self.task is not None
        distinct, index = torch.unique(ROLES * mission + role, return_inverse=True)
        return by_context(network, x, self.task(distinct // ROLES, distinct % ROLES), index)

    def policy(self, decided: Tensor) -> Categorical:
        """Distribution of actions `[B]`."""
        return Categorical(logits=self.actor(decided).float(), validate_args=False)

    def value(self, decided: Tensor) -> Tensor:
        """Values `[B, 1]`."""
        return cast(Tensor, self.critic(decided)).float()
