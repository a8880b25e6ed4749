"""What the on-policy algorithms share: advantages and value targets of a collected batch, and its passes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Literal

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

from lightning_hyper.algorithms.base import Algorithm
from lightning_hyper.modules import ReturnScale
from lightning_hyper.modules.normalization import moments_over_ranks
from lightning_hyper.objectives import PPOLoss


class OnPolicy(Algorithm):
    """Learns from each collected batch alone, in a few passes of minibatches.

    Args:
        loss: the clipped surrogate and its weights.
        lr: learning rate of Adam.
        adam_eps: epsilon of Adam.
        gamma: discount per frame.
        gae_lambda: lambda of the generalised advantage estimate.
        epochs: passes over a collected batch.
        minibatches: parts of a pass, one update each.
        normalize_reward: divide rewards by the running deviation of the discounted return.
        normalize_advantage: standardise advantages over the `batch` or over each `minibatch` (of all ranks); null for
            neither.
    """

    def __init__(
        self,
        *,
        loss: PPOLoss | None = None,
        lr: float = 7e-4,
        adam_eps: float = 1e-5,
        gamma: float = 0.95,
        gae_lambda: float = 0.95,
        epochs: int = 2,
        minibatches: int = 4,
        normalize_reward: bool = True,
        normalize_advantage: Literal["batch", "minibatch"] | None = "batch",
        max_grad_norm: float | None = 0.5,
        lr_schedule: Literal["constant", "linear"] = "constant",
    ) -> None:
        super().__init__(max_grad_norm=max_grad_norm, lr_schedule=lr_schedule)
        for key, count in (("lr", lr), ("epochs", epochs), ("minibatches", minibatches)):
            if count <= 0:
                raise ValueError(f"model.{key} is {count}; it must be positive")
        for key, share in (("gamma", gamma), ("gae_lambda", gae_lambda)):
            if not 0 <= share <= 1:
                raise ValueError(f"model.{key} is {share}; it must lie in [0, 1]")
        if normalize_advantage not in ("batch", "minibatch", None):
            raise ValueError(
                f"model.normalize_advantage is {normalize_advantage!r}; it must be 'batch', 'minibatch' or null"
            )
        self.loss = loss or PPOLoss()
        self.lr, self.adam_eps, self.gamma, self.gae_lambda = lr, adam_eps, gamma, gae_lambda
        self.epochs, self.minibatches, self.normalize_advantage = epochs, minibatches, normalize_advantage
        self.return_scale = ReturnScale(gamma) if normalize_reward else None

    @abstractmethod
    def value_after(self, batch: TensorDict, rows: Tensor, steps: Tensor) -> Tensor:
        """Values `[K, 1]` of what `next` shows of the environments `rows` at `steps`, each `[K]`."""

    @torch.no_grad()
    def estimate(self, batch: TensorDict) -> dict[str, Tensor]:
        """What the losses compare with, `[num_envs, time, ...]`: actions, old values, advantages, value targets."""
        reward, done, terminated = (batch["next", key] for key in ("reward", "done", "terminated"))
        if self.return_scale is not None:
            reward = self.return_scale(reward, done)
        value = batch["state_value"]
        advantage, target = vec_generalized_advantage_estimate(
            self.gamma, self.gae_lambda, value, self._next_value(batch), reward, done, terminated
        )
        if self.normalize_advantage == "batch":
            advantage = standardized(advantage)
        return {
            "action": batch["action"],
            "log_prob": batch["log_prob"],
            "old_value": value.squeeze(-1),
            "advantage": advantage.squeeze(-1),
            "target": target.squeeze(-1),
        }

    def _next_value(self, batch: TensorDict) -> Tensor:
        """Values after each step: the next step's, or the last observation's where an episode or the batch is cut."""
        done, terminated, value = batch["next", "done"], batch["next", "terminated"], batch["state_value"]
        after = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
        cut = done.clone()
        cut[:, -1] = True
        rows, steps = (cut & ~terminated).squeeze(-1).nonzero(as_tuple=True)
        if len(rows):
            after[rows, steps] = self.value_after(batch, rows, steps)
        return after

    def order(self, count: int, device: torch.device) -> Tensor:
        """A random order of `count` rows, drawn on the CPU: one generator, the same order on every device."""
        return torch.randperm(count).to(device)

    def minibatched(self, data: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """The minibatches of one pass over entries `[B, ...]`."""
        order = self.order(len(data["advantage"]), data["advantage"].device)
        chunks = {key: entry[order].chunk(self.minibatches) for key, entry in data.items()}
        for k in range(self.minibatches):
            yield {key: parts[k] for key, parts in chunks.items()}


def standardized(advantage: Tensor) -> Tensor:
    """Mean 0 and variance 1 over everything, on all ranks together."""
    _, mean, variance = moments_over_ranks(advantage.reshape(-1, 1))
    return ((advantage - mean) / (variance.sqrt() + 1e-5)).to(advantage.dtype)
