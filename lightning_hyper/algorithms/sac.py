"""SAC: soft actor-critic, with any conditional network as its Q-functions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hyper.algorithms.off_policy import OffPolicy
from lightning_hyper.experience.replay_buffer import Minibatch
from lightning_hyper.modules import Spaces
from lightning_hyper.modules.critic import frozen
from lightning_hyper.modules.policies import GaussianPolicy


class SAC(OffPolicy):
    """Soft actor-critic without a state value, with a fixed or a tuned entropy coefficient alpha.

    1. The critics learn y = R + discount (min(Q1', Q2')(s', a') - alpha log pi(a'|s')), a' drawn from the policy.
    2. The policy climbs min(Q1, Q2) - alpha log pi, and alpha moves the entropy to its target.
    3. The targets follow.

    TorchRL's loss says the same, but evaluates stacked critics under `vmap`, which takes longer than the update itself.

    Args:
        alpha: entropy coefficient, or where it begins.
        tune_alpha: learn alpha, so that the entropy of the policy meets `target_entropy`.
        target_entropy: entropy in nats for actions in [-1, 1]; null for minus the number of action dimensions.
        alpha_lr: learning rate of log alpha.

    Source: Haarnoja et al. 2018 (both papers); with hypernetwork critics arXiv 2106.06842.
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        tune_alpha: bool = True,
        target_entropy: float | None = None,
        alpha_lr: float = 3e-4,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        for key, value in (("alpha", alpha), ("alpha_lr", alpha_lr)):
            if value <= 0:
                raise ValueError(f"model.{key} is {value}; it must be positive")
        self.tune_alpha, self.target_entropy, self.alpha_lr = tune_alpha, target_entropy, alpha_lr
        self.log_alpha = nn.Parameter(torch.tensor(math.log(alpha)), requires_grad=tune_alpha)

    def make_policy(self, spaces: Spaces) -> GaussianPolicy:
        return GaussianPolicy(spaces, self.actor, normalize_observation=self.normalize_observation)

    def build(self, spaces: Spaces) -> None:
        super().build(spaces)
        self._entropy = -float(spaces.actions) if self.target_entropy is None else self.target_entropy

    def extra_groups(self) -> list[dict[str, Any]]:
        return [self._group("alpha", [self.log_alpha], self.alpha_lr)] if self.tune_alpha else []

    def _update(self, minibatch: Minibatch) -> dict[str, Tensor]:
        loss, value, error = self._critic_loss_of(minibatch)
        measured = {"critic": loss, "q": value, **self.update(loss, groups=["critic"]), "td_error": error}
        with frozen(self.critics):
            loss, log_prob = self._actor_loss_of(minibatch)
        measured |= {"actor": loss, "entropy": -log_prob, "alpha": self.log_alpha.detach().exp()}
        groups = ["actor"]
        if self.tune_alpha:
            loss = loss - self.log_alpha * (log_prob + self._entropy)
            groups.append("alpha")
        measured |= self.update(loss, groups=groups)
        self._follow(self.target_critics, self.critics)
        return measured

    def critic_loss(self, minibatch: Minibatch) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            action, log_prob = self.agent.sample(minibatch["next_observation"])
            after = torch.minimum(*self.target_critics(minibatch["next_observation"], action))
            after = after - self.log_alpha.exp() * log_prob
            target = minibatch["reward"] + minibatch["discount"] * after
        q1, q2 = self.critics(minibatch["observation"], minibatch["action"])
        loss = 0.5 * (self._squared(q1, target, minibatch) + self._squared(q2, target, minibatch))
        return loss, q1.detach().mean(), (q1.detach() - target).abs()

    def actor_loss(self, minibatch: Minibatch) -> tuple[Tensor, ...]:
        state = minibatch["observation"]
        action, log_prob = self.agent.sample(state)
        value = torch.minimum(*self.critics(state, action))
        return (self.log_alpha.detach().exp() * log_prob - value).mean(), log_prob.detach().mean()
