"""TD3: twin delayed deterministic policy gradient, with any conditional network as its Q-functions."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from lightning_hyper.algorithms.off_policy import OffPolicy, target_of
from lightning_hyper.checks import Count, NonNegative, checked
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.experience.replay_buffer import Minibatch
from lightning_hyper.modules.conditioned import ConditionalFactory
from lightning_hyper.modules.critic import frozen
from lightning_hyper.modules.policies import DeterministicPolicy


class TD3(OffPolicy):
    """Twin delayed DDPG.

    1. The critics learn y = R + discount min(Q1', Q2')(s', a'), with a' the target policy's action plus clipped noise.
    2. Every `policy_delay` updates the policy climbs Q1, and all targets follow.

    TorchRL's loss says the same, but evaluates stacked critics under `vmap`, which takes longer than the update itself.

    Args:
        exploration_noise: standard deviation of the noise while collecting, in half ranges of the action, as the next
            two.
        target_noise: standard deviation of the noise on the target policy's action.
        target_noise_clip: largest size of that noise.
        policy_delay: updates of the critics for each of the policy and the targets.
        options: as in `OffPolicy`.

    Source: Fujimoto et al. 2018; with hypernetwork critics arXiv 2106.06842.
    """

    @checked
    def __init__(
        self,
        *,
        exploration_noise: NonNegative = 0.1,
        target_noise: NonNegative = 0.2,
        target_noise_clip: NonNegative = 0.5,
        policy_delay: Count = 2,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.exploration_noise, self.policy_delay = exploration_noise, policy_delay
        self.target_noise, self.target_noise_clip = target_noise, target_noise_clip
        self._updates = 0

    def make_policy(self, spaces: Spaces, actor: ConditionalFactory, **options: Any) -> DeterministicPolicy:
        return DeterministicPolicy(spaces, actor, noise=self.exploration_noise, **options)

    def build(self, spaces: Spaces) -> None:
        super().build(spaces)
        self.target_observation = target_of(self.agent.observation)
        self.target_actor = target_of(self.agent.actor)

    def learn_minibatch(self, minibatch: Minibatch) -> tuple[dict[str, Tensor], Tensor]:
        loss, value, error = self.critic_loss(minibatch)
        measured = {"critic": loss.detach(), "q": value, **self.update(loss, groups=["critic"])}
        self._updates += 1
        if self._updates % self.policy_delay == 0:
            with frozen(self.critics):
                (loss,) = self.actor_loss(minibatch)
            measured |= {"actor": loss.detach(), **self.update(loss, groups=["actor"])}
            self.follow(
                (self.target_critics, self.critics),
                (self.target_observation, self.agent.observation),
                (self.target_actor, self.agent.actor),
            )
        return measured, error

    def critic_loss(self, minibatch: Minibatch) -> tuple[Tensor, Tensor, Tensor]:
        contexts, following_contexts = self.contexts(minibatch)
        following = self.following(minibatch)
        with torch.no_grad():
            noise = torch.randn_like(minibatch["action"]).mul_(self.target_noise)
            noise.clamp_(-self.target_noise_clip, self.target_noise_clip)
            mode = torch.tanh(following_contexts.condition(self.target_actor, self.target_observation(following)))
            after = torch.minimum(*self.target_critics(following, (mode + noise).clamp(-1, 1), following_contexts))
            target = minibatch["reward"] + minibatch["discount"] * after
        q1, q2 = self.critics(minibatch, minibatch["action"], contexts)
        loss = self.squared_error(q1, target, minibatch) + self.squared_error(q2, target, minibatch)
        return loss, q1.detach().mean(), (q1.detach() - target).abs()

    def actor_loss(self, minibatch: Minibatch) -> tuple[Tensor, ...]:
        with torch.no_grad():
            contexts, _ = self.contexts(minibatch)
        action = self.policy.mode(self.policy.observation(minibatch), contexts)
        return (-self.critics.value(minibatch, action, contexts).mean(),)

    @property
    def policy(self) -> DeterministicPolicy:
        return cast(DeterministicPolicy, self.agent)

    def save_state(self) -> dict[str, Any]:
        return {**super().save_state(), "updates": self._updates}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self._updates = state["updates"]
