"""The clipped surrogate of PPO.

TorchRL's `ClipPPOLoss` calls actor and critic modules on a tensordict by itself; here both share one encoding of the
trial, which is computed once and handed in.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F

from lightning_hyper.checks import NonNegative, PositiveShare, checked


class PPOLoss(nn.Module):
    """Clipped surrogate, clipped value loss and entropy bonus.

    Args:
        clip: half-width of the interval around 1 in which the probability ratio counts, and by which values may move.
        entropy: weight of the entropy bonus.
        value: weight of the value loss.
        value_loss: half the squared error (`mse`), or half the Huber loss (`huber`) as in arXiv 2309.14970's code.
        clip_value: take the larger of the losses of the value and of the value clipped around the old one.

    Source: Schulman et al. 2017; value form of arXiv 2309.14970's code: 0.5 max(huber(V - R), huber(V_clip - R)).
        Retrieved values: arXiv 2306.10698's code.
    """

    @checked
    def __init__(
        self,
        *,
        clip: PositiveShare = 0.2,
        entropy: NonNegative = 0.0,
        value: NonNegative = 1.0,
        value_loss: Literal["mse", "huber"] = "mse",
        clip_value: bool = False,
    ) -> None:
        super().__init__()
        self.clip, self.entropy, self.value = clip, entropy, value
        self.value_loss, self.clip_value = value_loss, clip_value

    def forward(
        self,
        policy: Distribution,
        value: Float[Tensor, " B"],
        *,
        action: Real[Tensor, "B ..."],
        log_prob: Float[Tensor, " B"],
        old_value: Float[Tensor, " B"],
        advantage: Float[Tensor, " B"],
        target: Float[Tensor, " B"],
        remembered: tuple[Float[Tensor, " B"], Float[Tensor, " B"]] | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """Means over a minibatch of B steps: `total`, and its parts for the log.

        Args:
            policy: current distribution, batch shape `[B]`.
            value: current values `[B]`.
            action: actions taken `[B, ...]`; log_prob: their old log-probabilities `[B]`; old_value: old values `[B]`.
            advantage: `[B]`; target: value targets `[B]`.
            remembered: values `[B]` retrieved from a memory, and the share alpha `[B]` by which the value is drawn
                towards them rather than to the target; the value clipped around the old one knows only the target.
        """
        log_ratio = policy.log_prob(action) - log_prob
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        policy_loss = -torch.min(ratio * advantage, clipped * advantage).mean()
        value_loss = self._distance(value, target)
        if remembered is not None:
            memory_value, alpha = remembered
            value_loss = (1 - alpha) * value_loss + alpha * self._distance(value, memory_value)
        if self.clip_value:
            near = old_value + (value - old_value).clamp(-self.clip, self.clip)
            value_loss = torch.max(value_loss, self._distance(near, target))
        value_loss = value_loss.mean()
        entropy = policy.entropy().mean()
        return {
            "total": policy_loss + self.value * value_loss - self.entropy * entropy,
            "policy": policy_loss,
            "value": value_loss,
            "entropy": entropy,
            "kl": (ratio - 1 - log_ratio).mean(),
            "clipped": ((ratio - 1).abs() > self.clip).float().mean(),
        }

    def _distance(self, value: Tensor, target: Tensor) -> Tensor:
        if self.value_loss == "huber":
            return 0.5 * F.smooth_l1_loss(value, target, reduction="none")
        return 0.5 * F.mse_loss(value, target, reduction="none")
