"""What TD3 and SAC share: a policy, twin critics, their targets, and updates on minibatches of a replay buffer."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from lightning_hyper.algorithms.base import Algorithm
from lightning_hyper.algorithms.inference import Inference
from lightning_hyper.checks import PositiveShare, Rate, checked
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.experience.replay import Replayed
from lightning_hyper.experience.replay_buffer import Minibatch, split
from lightning_hyper.modules import Contexts, ReturnScale, RunningNorm
from lightning_hyper.modules.conditioned import ConditionalFactory
from lightning_hyper.modules.context import ContextFactories
from lightning_hyper.modules.critic import Part, TwinCritic
from lightning_hyper.modules.observation import EncoderFactory
from lightning_hyper.modules.policies import BoundedPolicy
from lightning_hyper.nn import Concat

Network = TypeVar("Network", bound=nn.Module)


class OffPolicy(Algorithm):
    """An actor and twin critics that learn from a replay buffer.

    Policy and critics share the context source, which learns from the critics' loss; the policy's loss sees its
    contexts as given. Each of the two has an encoder of its own. A source with a memory learns over windows of frames,
    see `data.sequence`.

    Args:
        actor: makes the network of the policy; null for two layers of 256 ReLU units.
        critic: makes a Q-function, of which there are two; null for two layers of 256 ReLU units.
        encoder: makes an encoder of the observation, one for the policy and one for the critics.
        context: makes the context source, or several which are joined; null for none.
        embedding: makes an embedding of the context.
        critic_context: what the Q-functions are conditioned on, of `state`, `action`, `constant`, `task`: see
            `TwinCritic`.
        shared_trunk: one trunk for both critics.
        actor_lr: learning rate of Adam for the policy.
        critic_lr: learning rate for the critics and the context source.
        gamma: discount per frame.
        tau: share of the networks that goes into their targets at each of the targets' updates.
        normalize_observation: running standardisation of observations.
        normalize_reward: divide rewards by the running deviation of the discounted return.
        compile: compile the losses with `torch.compile`; slower on CPUs.
        options: as in `Algorithm`.
    """

    @checked
    def __init__(
        self,
        *,
        actor: ConditionalFactory | None = None,
        critic: ConditionalFactory | None = None,
        encoder: EncoderFactory | None = None,
        context: ContextFactories = None,
        embedding: EncoderFactory | None = None,
        critic_context: Sequence[Part] = ("state",),
        shared_trunk: bool = False,
        actor_lr: Rate = 3e-4,
        critic_lr: Rate = 3e-4,
        gamma: PositiveShare = 0.99,
        tau: PositiveShare = 0.005,
        normalize_observation: bool = False,
        normalize_reward: bool = False,
        compile: bool = False,  # noqa: A002
        **options: Any,
    ) -> None:
        super().__init__(**options)
        plain = partial(Concat, hidden=(256, 256), activation="relu")
        self.actor, self.critic, self.encoder = actor or plain, critic or plain, encoder
        self.context, self.embedding, self.critic_context = context, embedding, critic_context
        self.shared_trunk, self.normalize_observation = shared_trunk, normalize_observation
        self.actor_lr, self.critic_lr, self.gamma, self.tau = actor_lr, critic_lr, gamma, tau
        self.return_scale = ReturnScale(gamma) if normalize_reward else None
        if compile:
            for name in ("critic_loss", "actor_loss"):
                setattr(self, name, torch.compile(getattr(self, name)))

    # What a subclass supplies.

    @abstractmethod
    def make_policy(self, spaces: Spaces, actor: ConditionalFactory, **options: Any) -> BoundedPolicy:
        """The policy for these sizes; the options are those of `BoundedPolicy`."""

    @abstractmethod
    def learn_minibatch(self, minibatch: Minibatch) -> tuple[dict[str, Tensor], Tensor]:
        """One update; gives what it measured, and the size of each sample's error."""

    @abstractmethod
    def critic_loss(self, minibatch: Minibatch) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of the critics, mean value, and the size of each sample's error."""

    @abstractmethod
    def actor_loss(self, minibatch: Minibatch) -> tuple[Tensor, ...]:
        """Loss of the policy, and what else it measures."""

    # What the base class calls.

    def build(self, spaces: Spaces) -> None:
        self.spaces = spaces
        self.agent = self.make_policy(
            spaces,
            self.actor,
            encoder=self.encoder,
            context=self.context,
            embedding=self.embedding,
            normalize_observation=self.normalize_observation,
        )
        self.critics = TwinCritic(
            spaces,
            self.critic,
            context=self.critic_context,
            task_features=self.agent.context_features,
            encoder=self.encoder,
            norm=self.agent.observation.norm,
            shared_trunk=self.shared_trunk,
        )
        self.inference = Inference.of(self.agent.context)
        self.target_critics = target_of(self.critics)

    @property
    def policy(self) -> BoundedPolicy:
        return self.agent

    def parameter_groups(self) -> list[dict[str, Any]]:
        policy = [*self.agent.actor.parameters(), *self.agent.observation.parameters()]
        source = [part for part in (self.agent.context, self.agent.embedding) if part is not None]
        inferred = [] if self.inference is None else [self.inference.group()]
        apart = {id(parameter) for group in inferred for parameter in group["params"]}
        critics = [p for part in (self.critics, *source) for p in part.parameters() if id(p) not in apart]
        return [
            {"name": "actor", "params": policy, "lr": self.actor_lr},
            {"name": "critic", "params": critics, "lr": self.critic_lr},
            *inferred,
        ]

    def collected(self, batch: Replayed) -> TensorDict:
        return batch.collected

    def experienced(self, batch: Replayed) -> dict[str, Tensor]:
        return {**super().experienced(batch), **batch.frames()}

    def learn(self, batch: Replayed) -> list[dict[str, Tensor]]:
        self.agent.update_statistics(batch.collected)
        if self.return_scale is not None:
            self.return_scale.take_in(batch.collected["next", "reward"], batch.collected["next", "done"])
        measured = []
        for block in batch.blocks():
            for minibatch in split(self.preprocess(block), batch.batch_size):
                update, error = self.learn_minibatch(minibatch)
                batch.prioritize(minibatch, error)
                measured.append(update)
        if self.inference is not None:
            measured += self.inference.learn(batch.collected, self.update)
        return measured

    def preprocess(self, block: Minibatch) -> Minibatch:
        """Samples as the losses want them: actions scaled, n-step return and discount, the steps of a window apart."""
        reward = block["reward"] if self.return_scale is None else self.return_scale.scaled(block["reward"])
        powers = self.gamma ** torch.arange(reward.shape[-1], device=reward.device)
        ready = {
            **block,
            "action": self.agent.scaled(block["action"]),
            "reward": reward @ powers,
            "discount": self.gamma ** block["steps"] * ~block["terminated"],
        }
        if "place" in block:
            place = block["place"]
            row = torch.arange(len(place), device=place.device).unsqueeze(-1)
            for key in self.agent.observation.in_keys:
                window = block[f"window_{key}"]
                ready[key], ready[f"next_{key}"] = window[row, place], window[row, place + 1]
        return ready

    # What a subclass uses.

    def following(self, minibatch: Minibatch) -> Minibatch:
        """The observations that follow, under the names of the observations."""
        return {key: minibatch[f"next_{key}"] for key in self.agent.observation.in_keys}

    def contexts(self, minibatch: Minibatch) -> tuple[Contexts, Contexts]:
        """Contexts of the samples, and, without gradients, of the steps that follow."""
        policy = self.agent
        if policy.context is None:
            nothing = Contexts(minibatch["action"][..., :0])
            return nothing, nothing
        if "place" in minibatch:
            window = {key: minibatch[f"window_{key}"] for key in policy.window_keys}
            each = self._contexts_of(window, minibatch["context_state"]).each()
            place = minibatch["place"]
            row = torch.arange(len(place), device=place.device).unsqueeze(-1)
            return Contexts(each[row, place]), Contexts(each[row, place + 1].detach())
        steps = {key: minibatch[key].unsqueeze(1) for key in policy.window_keys}
        after = {key: minibatch[f"next_{key}"].unsqueeze(1) for key in policy.window_keys}
        with torch.no_grad():
            following = self._contexts_of(after).flat()
        return self._contexts_of(steps).flat(), following

    def _contexts_of(self, window: Minibatch, state: Tensor | None = None) -> Contexts:
        with torch.no_grad():  # the policy's encoder learns from the policy's loss, the source from the critics'
            x = self.agent.observation(window)
        return self.agent.contexts(window, x, state)[0]

    @staticmethod
    def squared_error(value: Tensor, target: Tensor, minibatch: Minibatch) -> Tensor:
        """Mean squared error, weighted where sampling was prioritised."""
        error = (value - target).square()
        return (error * minibatch["weight"]).mean() if "weight" in minibatch else error.mean()

    @torch.no_grad()
    def follow(self, *pairs: tuple[nn.Module, nn.Module]) -> None:
        """Move targets, the first of each pair, towards their networks by `tau`."""
        targets: list[Tensor] = [parameter for target, _ in pairs for parameter in target.parameters()]
        networks: list[Tensor] = [parameter for _, network in pairs for parameter in network.parameters()]
        torch._foreach_lerp_(targets, networks, self.tau)


def target_of(network: Network) -> Network:
    """A copy that gradients do not reach; running statistics are shared with it rather than copied."""
    shared = {id(part): part for part in network.modules() if isinstance(part, RunningNorm)}
    return copy.deepcopy(network, shared).requires_grad_(False)
