"""SAC: soft actor-critic, with any conditional network as its Q-functions."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_hyper.algorithms.off_policy import OffPolicy
from lightning_hyper.checks import Finite, Positive, Rate, checked
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.experience.replay_buffer import Minibatch
from lightning_hyper.modules.conditioned import ConditionalFactory
from lightning_hyper.modules.critic import frozen
from lightning_hyper.modules.policies import GaussianPolicy


class SAC(OffPolicy):
    """Soft actor-critic without a state value, with a fixed or a tuned entropy coefficient alpha.

    1. The critics learn y = R + discount (min(Q1', Q2')(s', a') - alpha log pi(a'|s')), a' drawn from the policy. Their
       loss is half the squared errors, as in Haarnoja et al. and Stable-Baselines3; the code of arXiv 2106.06842 leaves
       the half out, which Adam makes up for but for its epsilon.
    2. The policy climbs min(Q1, Q2) - alpha log pi, and alpha moves the entropy to its target.
    3. The targets follow.

    TorchRL's loss says the same, but evaluates stacked critics under `vmap`, which takes longer than the update itself.

    Args:
        alpha: entropy coefficient, or where it begins.
        tune_alpha: learn alpha, so that the entropy of the policy meets `target_entropy`.
        target_entropy: entropy in nats for actions in [-1, 1]; null for minus the number of action dimensions.
        alpha_lr: learning rate of log alpha.
        options: as in `OffPolicy`.

    Source: Haarnoja et al. 2018 (both papers); with hypernetwork critics arXiv 2106.06842.
    """

    @checked
    def __init__(
        self,
        *,
        alpha: Positive = 1.0,
        tune_alpha: bool = True,
        target_entropy: Finite | None = None,
        alpha_lr: Rate = 3e-4,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.tune_alpha, self.target_entropy, self.alpha_lr = tune_alpha, target_entropy, alpha_lr
        self.log_alpha = nn.Parameter(torch.tensor(math.log(alpha)), requires_grad=tune_alpha)

    def make_policy(self, spaces: Spaces, actor: ConditionalFactory, **options: Any) -> GaussianPolicy:
        return GaussianPolicy(spaces, actor, **options)

    def build(self, spaces: Spaces) -> None:
        super().build(spaces)
        self._entropy = -float(spaces.actions) if self.target_entropy is None else self.target_entropy

    def parameter_groups(self) -> list[dict[str, Any]]:
        alpha = {"name": "alpha", "params": [self.log_alpha], "lr": self.alpha_lr}
        return [*super().parameter_groups(), *([alpha] if self.tune_alpha else [])]

    def learn_minibatch(self, minibatch: Minibatch) -> tuple[dict[str, Tensor], Tensor]:
        loss, value, error = self.critic_loss(minibatch)
        measured = {"critic": loss.detach(), "q": value, **self.update(loss, groups=["critic"])}
        with frozen(self.critics):
            loss, log_prob = self.actor_loss(minibatch)
        measured |= {"actor": loss.detach(), "entropy": -log_prob, "alpha": self.log_alpha.detach().exp()}
        groups = ["actor"]
        if self.tune_alpha:
            loss = loss - self.log_alpha * (log_prob + self._entropy)
            groups.append("alpha")
        measured |= self.update(loss, groups=groups)
        self.follow((self.target_critics, self.critics))
        return measured, error

    def critic_loss(self, minibatch: Minibatch) -> tuple[Tensor, Tensor, Tensor]:
        contexts, following_contexts = self.contexts(minibatch)
        following = self.following(minibatch)
        with torch.no_grad():
            action, log_prob = self.policy.sample(self.policy.observation(following), following_contexts)
            after = torch.minimum(*self.target_critics(following, action, following_contexts))
            after = after - self.log_alpha.exp() * log_prob
            target = minibatch["reward"] + minibatch["discount"] * after
        q1, q2 = self.critics(minibatch, minibatch["action"], contexts)
        loss = 0.5 * (self.squared_error(q1, target, minibatch) + self.squared_error(q2, target, minibatch))
        return loss, q1.detach().mean(), (q1.detach() - target).abs()

    def actor_loss(self, minibatch: Minibatch) -> tuple[Tensor, ...]:
        with torch.no_grad():
            contexts, _ = self.contexts(minibatch)
        action, log_prob = self.policy.sample(self.policy.observation(minibatch), contexts)
        value = torch.minimum(*self.critics(minibatch, action, contexts))
        return (self.log_alpha.detach().exp() * log_prob - value).mean(), log_prob.detach().mean()

    @property
    def policy(self) -> GaussianPolicy:
        return cast(GaussianPolicy, self.agent)
