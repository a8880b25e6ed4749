"""Policies of one observation with bounded continuous actions: what acts, and what off-policy losses differentiate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import cast

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.envs.utils import ExplorationType, exploration_type

from lightning_hyper.modules.normalization import RunningNorm
from lightning_hyper.modules.spaces import Spaces
from lightning_hyper.nn import MLP

ActorFactory = Callable[[int, int], MLP]


class BoundedPolicy(TensorDictModuleBase, ABC):
    """Reads `observation` `[num_envs, features]`, writes `action` `[num_envs, actions]` in the environment's units.

    Networks see actions scaled to [-1, 1], and observations standardised where that is asked for.

    Args:
        spaces: sizes and bounds of the environment.
        network: from observations to `outputs` numbers for each dimension of the action.
        normalize_observation: standardise observations by running statistics.

    Raises:
        ValueError: actions are discrete or have no bounds.
    """

    outputs = 1

    def __init__(self, spaces: Spaces, network: ActorFactory, *, normalize_observation: bool = False) -> None:
        super().__init__()
        if spaces.discrete or not all(math.isfinite(x) for x in (*spaces.low, *spaces.high)) or not spaces.low:
            kind = "discrete" if spaces.discrete else "unbounded"
            raise ValueError(f"data.env has {kind} actions; model needs continuous actions between finite bounds")
        self.in_keys, self.out_keys = ["observation"], ["action"]
        low, high = torch.tensor(spaces.low), torch.tensor(spaces.high)
        self.is_unit = bool((low == -1).all() and (high == 1).all())
        self.register_buffer("centre", (low + high) / 2, persistent=False)
        self.register_buffer("reach", (high - low) / 2, persistent=False)
        self.norm: nn.Module = RunningNorm(spaces.observation) if normalize_observation else nn.Identity()
        self.network = network(spaces.observation, self.outputs * spaces.actions)

    @abstractmethod
    def act(self, x: Tensor) -> Tensor:
        """Scaled actions `[num_envs, actions]` for inputs `[num_envs, features]`, drawn or the most likely."""

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = self.act(self.norm(tensordict.get("observation")))
        return tensordict.set("action", action if self.is_unit else self.centre + self.reach * action)

    def scaled(self, action: Tensor) -> Tensor:
        """Actions in the environment's units, brought to [-1, 1]."""
        return action if self.is_unit else cast(Tensor, (action - self.centre) / self.reach)

    def observe(self, observation: Tensor) -> None:
        """Take collected observations into the running statistics."""
        if isinstance(self.norm, RunningNorm):
            self.norm.update(observation)


class DeterministicPolicy(BoundedPolicy):
    """tanh of the network's output; exploration adds Gaussian noise.

    Args:
        spaces, network, normalize_observation: as in `BoundedPolicy`.
        noise: standard deviation of the exploration noise, in units of half the action's range.
    """

    def __init__(
        self, spaces: Spaces, network: ActorFactory, *, noise: float, normalize_observation: bool = False
    ) -> None:
        super().__init__(spaces, network, normalize_observation=normalize_observation)
        self.noise = noise

    def mode(self, x: Tensor) -> Tensor:
        """Scaled actions `[*B, actions]` without noise."""
        return torch.tanh(self.network(x))

    def act(self, x: Tensor) -> Tensor:
        action = self.mode(x)
        if exploration_type() == ExplorationType.DETERMINISTIC:
            return action
        return (action + self.noise * torch.randn_like(action)).clamp(-1, 1)


class GaussianPolicy(BoundedPolicy):
    """tanh of a Gaussian whose mean and log standard deviation are the network's outputs (Haarnoja et al. 2018).

    Args:
        spaces, network, normalize_observation: as in `BoundedPolicy`.
    """

    outputs = 2
    LOG_STD = (-20.0, 2.0)

    def act(self, x: Tensor) -> Tensor:
        mean, log_std = self._moments(x)
        if exploration_type() == ExplorationType.DETERMINISTIC:
            return torch.tanh(mean)
        return torch.tanh(mean + log_std.exp() * torch.randn_like(mean))

    def sample(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled actions `[*B, actions]` with their log-density `[*B]` in [-1, 1]; differentiable."""
        mean, log_std = self._moments(x)
        noise = torch.randn_like(mean)
        raw = mean + log_std.exp() * noise
        # log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), which does not overflow
        squash = 2 * (math.log(2) - raw - F.softplus(-2 * raw))
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi) - squash
        return torch.tanh(raw), log_prob.sum(-1)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.network(x).float().chunk(2, -1)
        return mean, log_std.clamp(*self.LOG_STD)
