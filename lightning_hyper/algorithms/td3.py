"""TD3: twin delayed deterministic policy gradient, with any conditional network as its Q-functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_hyper.algorithms.off_policy import OffPolicy, target_of
from lightning_hyper.experience.replay_buffer import Minibatch
from lightning_hyper.modules import Spaces
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

    Source: Fujimoto et al. 2018; with hypernetwork critics arXiv 2106.06842.
    """

    def __init__(
        self,
        *,
        exploration_noise: float = 0.1,
        target_noise: float = 0.2,
        target_noise_clip: float = 0.5,
        policy_delay: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        for key, value in (
            ("exploration_noise", exploration_noise),
            ("target_noise", target_noise),
            ("target_noise_clip", target_noise_clip),
        ):
            if value < 0:
                raise ValueError(f"model.{key} is {value}; it must not be negative")
        if policy_delay < 1:
            raise ValueError(f"model.policy_delay is {policy_delay}; it must be at least 1")
        self.exploration_noise, self.policy_delay = exploration_noise, policy_delay
        self.target_noise, self.target_noise_clip = target_noise, target_noise_clip
        self._updates = 0

    def make_policy(self, spaces: Spaces) -> DeterministicPolicy:
        return DeterministicPolicy(
            spaces, self.actor, noise=self.exploration_noise, normalize_observation=self.normalize_observation
        )

    def build(self, spaces: Spaces) -> None:
        super().build(spaces)
        self.target_agent = target_of(self.agent.network)

    def _update(self, minibatch: Minibatch) -> dict[str, Tensor]:
        loss, value, error = self._critic_loss_of(minibatch)
        measured = {"critic": loss, "q": value, **self.update(loss, groups=["critic"]), "td_error": error}
        self._updates += 1
        if self._updates % self.policy_delay == 0:
            with frozen(self.critics):
                (loss,) = self._actor_loss_of(minibatch)
            measured |= {"actor": loss, **self.update(loss, groups=["actor"])}
            self._follow(self.target_critics, self.critics)
            self._follow(self.target_agent, self.agent.network)
        return measured

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["updates"] = self._updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._updates = checkpoint["updates"]

    def critic_loss(self, minibatch: Minibatch) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            noise = torch.randn_like(minibatch["action"]).mul_(self.target_noise)
            noise.clamp_(-self.target_noise_clip, self.target_noise_clip)
            action = (torch.tanh(self.target_agent(minibatch["next_observation"])) + noise).clamp(-1, 1)
            after = torch.minimum(*self.target_critics(minibatch["next_observation"], action))
            target = minibatch["reward"] + minibatch["discount"] * after
        q1, q2 = self.critics(minibatch["observation"], minibatch["action"])
        loss = self._squared(q1, target, minibatch) + self._squared(q2, target, minibatch)
        return loss, q1.detach().mean(), (q1.detach() - target).abs()

    def actor_loss(self, minibatch: Minibatch) -> tuple[Tensor, ...]:
        state = minibatch["observation"]
        return (-self.critics.value(state, self.agent.mode(state)).mean(),)
