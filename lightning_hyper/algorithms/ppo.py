"""PPO over many tasks at once."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from lightning_hyper.algorithms.base import ended_episodes
from lightning_hyper.algorithms.on_policy import OnPolicy, standardized
from lightning_hyper.modules import Spaces
from lightning_hyper.modules.agent import ConditionalFactory
from lightning_hyper.modules.task import TaskFactory
from lightning_hyper.modules.task_agent import GridEncoderFactory, HeadFactory, TaskAgent


class PPO(OnPolicy):
    """Multi-task PPO: MPPO, MPPO that is told its task, and PPO with a hypernetwork decision layer, by its parts.

    Args:
        encoder: makes the encoder of observations.
        actor: makes the network of logits.
        critic: makes the network of values.
        task: makes the task source; null for an agent that is not told its task.
        decision: makes the decision layer f(features | task); null for none.
        options: as in `OnPolicy`.

    Source: arXiv 2306.10698 (MPPO, PPOHypernet).
    """

    def __init__(
        self,
        *,
        encoder: GridEncoderFactory,
        actor: HeadFactory,
        critic: HeadFactory,
        task: TaskFactory | None = None,
        decision: ConditionalFactory | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.encoder, self.actor, self.critic, self.task, self.decision = encoder, actor, critic, task, decision

    def build(self, spaces: Spaces) -> None:
        self.agent = TaskAgent(
            spaces,
            encoder=self.encoder,
            actor=self.actor,
            critic=self.critic,
            task=self.task,
            decision=self.decision,
        )

    @property
    def policy(self) -> TaskAgent:
        return self.agent

    def check(self, num_envs: int, steps: int) -> None:
        if num_envs * steps % self.minibatches:
            raise ValueError(
                f"model.minibatches is {self.minibatches}, which does not divide the {num_envs * steps} frames of a "
                "collected batch; choose a divisor"
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        group = {"name": "agent", "params": list(self.parameters()), "initial_lr": self.lr}
        return torch.optim.Adam([group], lr=self.lr, eps=self.adam_eps, fused=True)

    def learn(self, batch: TensorDict) -> list[dict[str, Tensor]]:
        seen = {key: batch[key] for key in ("observation", "mission", "task")}
        data = {key: entry.flatten(0, 1) for key, entry in {**seen, **self.estimate(batch)}.items()}
        measured = []
        for _ in range(self.epochs):
            for part in self.minibatched(data):
                if self.normalize_advantage == "minibatch":
                    part["advantage"] = standardized(part["advantage"])
                losses = self.losses(part)
                measured.append({**losses, **self.update(losses["total"])})
        return measured

    def losses(self, part: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a minibatch, entries `[B, ...]`."""
        return self.compare(part, self.agent.decide(self.agent.encoder(part["observation"]), part["mission"]))

    def returns(self, batch: TensorDict, prefix: str) -> dict[str, Tensor]:
        assert self.spaces is not None
        return ended_episodes(batch, prefix, self.spaces.tasks)

    def value_after(self, batch: TensorDict, rows: Tensor, steps: Tensor) -> Tensor:
        features = self.agent.encoder(batch["next", "observation"][rows, steps])
        return self.agent.value(self.agent.decide(features, batch["next", "mission"][rows, steps]))

    def compare(
        self, part: dict[str, Tensor], decided: Tensor, remembered: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Losses of a minibatch with the decision layer's features `[B, features]`; `remembered` as in `PPOLoss`."""
        targets = {key: part[key] for key in ("action", "log_prob", "old_value", "advantage", "target")}
        value = self.agent.value(decided).squeeze(-1)
        losses: dict[str, Tensor] = self.loss(self.agent.policy(decided), value, **targets, remembered=remembered)
        return losses
