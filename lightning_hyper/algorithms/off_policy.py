"""What TD3 and SAC share: a policy, twin critics, their targets, and updates on minibatches of a replay buffer."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from lightning_hyper.algorithms.base import Algorithm, ended_episodes
from lightning_hyper.experience.replay import Replayed
from lightning_hyper.experience.replay_buffer import Minibatch
from lightning_hyper.modules import Spaces
from lightning_hyper.modules.agent import ConditionalFactory
from lightning_hyper.modules.critic import Order, TwinCritic
from lightning_hyper.modules.policies import ActorFactory, BoundedPolicy


class OffPolicy(Algorithm):
    """An actor and twin critics that learn from a replay buffer.

    Args:
        actor: makes the network of the policy.
        critic: makes a Q-function, a conditional network; there are two of them.
        order: which of state (S) and action (A) is the context: see `TwinCritic`.
        shared_trunk: one trunk for both critics.
        actor_lr: learning rate of Adam for the policy.
        critic_lr: learning rate for the critics.
        gamma: discount per frame.
        tau: share of the networks that goes into their targets at each of the targets' updates.
        normalize_observation: running standardisation of observations.
        compile: compile the losses with `torch.compile`; slower on CPUs.
    """

    def __init__(
        self,
        *,
        actor: ActorFactory,
        critic: ConditionalFactory,
        order: Order = "SA",
        shared_trunk: bool = False,
        actor_lr: float = 3e-4,
        critic_lr: float = 3e-4,
        gamma: float = 0.99,
        tau: float = 0.005,
        normalize_observation: bool = False,
        compile: bool = False,  # noqa: A002
        max_grad_norm: float | None = None,
        lr_schedule: Literal["constant", "linear"] = "constant",
    ) -> None:
        super().__init__(max_grad_norm=max_grad_norm, lr_schedule=lr_schedule)
        for key, value in (("actor_lr", actor_lr), ("critic_lr", critic_lr)):
            if value <= 0:
                raise ValueError(f"model.{key} is {value}; it must be positive")
        for key, value in (("gamma", gamma), ("tau", tau)):
            if not 0 <= value <= 1:
                raise ValueError(f"model.{key} is {value}; it must lie in [0, 1]")
        self.actor, self.critic, self.order, self.shared_trunk = actor, critic, order, shared_trunk
        self.actor_lr, self.critic_lr, self.gamma, self.tau = actor_lr, critic_lr, gamma, tau
        self.normalize_observation = normalize_observation
        self._critic_loss_of, self._actor_loss_of = self.critic_loss, self.actor_loss
        if compile:
            self._critic_loss_of = torch.compile(self.critic_loss)
            self._actor_loss_of = torch.compile(self.actor_loss)

    # What a subclass supplies.

    @abstractmethod
    def make_policy(self, spaces: Spaces) -> BoundedPolicy:
        """The policy for these sizes."""

    @abstractmethod
    def _update(self, minibatch: Minibatch) -> dict[str, Tensor]:
        """One update; gives what it measured, `td_error` `[size]` included."""

    @abstractmethod
    def critic_loss(self, minibatch: Minibatch) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of the critics, mean value, and the size of each frame's error `[size]`."""

    @abstractmethod
    def actor_loss(self, minibatch: Minibatch) -> tuple[Tensor, ...]:
        """Loss of the policy, and what else it measures."""

    # What the base class calls.

    def build(self, spaces: Spaces) -> None:
        self.agent = self.make_policy(spaces)
        self.critics = TwinCritic(spaces, self.critic, order=self.order, shared_trunk=self.shared_trunk)
        self.target_critics = target_of(self.critics)

    @property
    def policy(self) -> BoundedPolicy:
        return self.agent

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [
            self._group("actor", self.agent.network.parameters(), self.actor_lr),
            self._group("critic", self.critics.parameters(), self.critic_lr),
        ]
        return torch.optim.Adam([*groups, *self.extra_groups()], fused=True)

    def extra_groups(self) -> list[dict[str, Any]]:
        """Parameter groups besides actor and critic."""
        return []

    @staticmethod
    def _group(name: str, parameters: Any, lr: float) -> dict[str, Any]:
        return {"name": name, "params": list(parameters), "lr": lr, "initial_lr": lr}

    def collected(self, batch: Replayed) -> TensorDict:
        return batch.collected

    def learn(self, batch: Replayed) -> list[dict[str, Tensor]]:
        self.agent.observe(batch.collected["observation"])
        measured = []
        for minibatch in batch.minibatches(self.seen):
            update = self._update(minibatch)
            error = update.pop("td_error")
            if batch.prioritize is not None:
                batch.prioritize(minibatch["index"], error)
            measured.append(update)
        return measured

    def seen(self, drawn: Minibatch) -> Minibatch:
        """Frames as the networks see them: observations standardised, actions scaled, n-step return and discount."""
        powers = self.gamma ** torch.arange(drawn["reward"].shape[-1], device=drawn["reward"].device)
        return {
            **drawn,
            "observation": self.agent.norm(drawn["observation"]),
            "next_observation": self.agent.norm(drawn["next_observation"]),
            "action": self.agent.scaled(drawn["action"]),
            "reward": drawn["reward"] @ powers,
            "discount": self.gamma ** drawn["steps"] * ~drawn["terminated"],
        }

    def returns(self, batch: TensorDict, prefix: str) -> dict[str, Tensor]:
        return ended_episodes(batch, prefix)

    # What a subclass uses.

    @staticmethod
    def _squared(value: Tensor, target: Tensor, minibatch: Minibatch) -> Tensor:
        """Mean squared error, weighted where sampling was prioritised."""
        error = (value - target).square()
        return (error * minibatch["weight"]).mean() if "weight" in minibatch else error.mean()

    @torch.no_grad()
    def _follow(self, target: nn.Module, network: nn.Module) -> None:
        torch._foreach_lerp_(list(target.parameters()), list(network.parameters()), self.tau)


def target_of(network: nn.Module) -> nn.Module:
    """A copy that gradients do not reach."""
    return copy.deepcopy(network).requires_grad_(False)
