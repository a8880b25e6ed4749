"""Running statistics of inputs and returns, equal on every rank and part of the checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lightning_hyper.checks import Positive, checked


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum over all ranks, in place; the value itself without a process group."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
    return value


def moments_over_ranks(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and biased variance over all leading dimensions and all ranks; `x` is `[..., features]`."""
    flat = x.reshape(-1, x.shape[-1]).double()
    count = torch.tensor(float(len(flat)), dtype=torch.float64, device=x.device)
    sums = sum_over_ranks(torch.cat([count.view(1), flat.sum(0)]))
    mean = sums[1:] / sums[0]
    variance = sum_over_ranks((flat - mean).square().sum(0)) / sums[0]
    return sums[0], mean, variance


class _Moments(nn.Module):
    """Running count, mean and variance of `features` values (Chan et al.'s parallel update)."""

    count: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(features, dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in a batch `[..., features]`, together with those of the other ranks."""
        count, mean, variance = moments_over_ranks(x)
        total = self.count + count
        delta = mean - self.mean
        self.variance.copy_(
            (self.variance * self.count + variance * count + delta.square() * self.count * count / total) / total
        )
        self.mean.add_(delta * count / total)
        self.count.copy_(total)


class RunningNorm(_Moments):
    """Standardise features by what has been seen so far; the identity until the first update.

    `forward([..., features]) -> [..., features]`.
    """

    @checked
    def __init__(self, features: int, *, epsilon: Positive = 1e-8) -> None:
        super().__init__(features)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.variance + self.epsilon).rsqrt().to(x.dtype)
        return (x - self.mean.to(x.dtype)) * scale


class NoNorm(nn.Module):
    """Leaves features as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def update(self, x: Tensor) -> None:
        """There is nothing to take in."""


class ReturnScale(_Moments):
    """Divide rewards by the running standard deviation of the discounted return, then clip.

    Args:
        gamma: discount of the return, which runs on from batch to batch and restarts where an episode ends.
        clip: largest absolute reward that comes out.

    Source: the reward normalisation of the PPO reference code (`VecNormalize`); arXiv 2309.14970's code uses it.
    """

    @checked
    def __init__(self, gamma: float, *, clip: Positive = 10.0, epsilon: Positive = 1e-8) -> None:
        super().__init__(1)
        self.gamma, self.clip, self.epsilon = gamma, clip, epsilon
        self._running: Tensor | None = None

    @torch.no_grad()
    def take_in(self, reward: Tensor, done: Tensor) -> None:
        """Take in the rewards `[num_envs, time, 1]` of a batch."""
        running = torch.zeros_like(reward[:, 0]) if self._running is None else self._running.to(reward.device)
        returns = []
        for t in range(reward.shape[1]):
            running = running * self.gamma + reward[:, t]
            returns.append(running)
            running = running * ~done[:, t]
        self.update(torch.stack(returns, 1))
        self._running = running

    def scaled(self, reward: Tensor) -> Tensor:
        """Rewards of any shape, scaled by what has been seen so far."""
        scale = (self.variance + self.epsilon).rsqrt().to(reward)
        return (reward * scale).clamp(-self.clip, self.clip)

    def forward(self, reward: Tensor, done: Tensor) -> Tensor:
        """Take in the rewards `[num_envs, time, 1]` of a batch and give them back scaled."""
        self.take_in(reward, done)
        return self.scaled(reward)

    def save_state(self) -> dict[str, Tensor]:
        """The running return of this rank's environments, which the statistics leave out."""
        return {} if self._running is None else {"running": self._running}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `save_state`."""
        self._running = state.get("running")
