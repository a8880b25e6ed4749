"""PPO through a trajectory encoder, over trials."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

from lightning_hyper.algorithms.base import Algorithm, episode_returns
from lightning_hyper.modules import MetaAgent, ReturnScale, Spaces
from lightning_hyper.modules.agent import INPUTS, ConditionalFactory, EncoderFactory
from lightning_hyper.modules.context import ContextFactory
from lightning_hyper.modules.normalization import moments_over_ranks
from lightning_hyper.objectives import PPOLoss


class MetaPPO(Algorithm):
    """PPO whose gradient goes through the context source: RNN, RNN+S, RNN+HN, Multi and Multi+HN by their parts.

    Args:
        context: makes the context source from the sizes of the environment.
        actor: makes the actor, a conditional network, from (inputs, context, outputs).
        critic: makes the critic.
        encoder: makes an embedding of the observation, shared by actor and critic.
        loss: the clipped surrogate and its weights.
        lr: learning rate of Adam for actor, critic and embedding.
        context_lr: learning rate for the context source; null for the same.
        adam_eps: epsilon of Adam.
        gamma: discount per frame.
        gae_lambda: lambda of the generalised advantage estimate.
        epochs: passes over a collected batch.
        minibatches: parts of a pass, one update each.
        partition: what a minibatch is a random part of: whole `trials` (only those are encoded again), or `steps` of
            all trials, for which all are encoded again each time, as in the published code.
        reencode: encode again for every `minibatch`, with the gradient of its loss (the paper); or once an `epoch`:
            the encoder then takes one step an epoch, on the gradients that its contexts gathered.
        bptt: steps after which the gradient through time is cut; null for the whole window.
        normalize_observation: running standardisation of what actor and critic see.
        normalize_reward: divide rewards by the running deviation of the discounted return.
        normalize_advantage: standardise advantages over the batch (all ranks).
        compile: compile heads and loss with `torch.compile`; slower on CPUs.

    Source: arXiv 2309.14970 (Beck et al. 2023), end-to-end methods.
    """

    def __init__(
        self,
        *,
        context: ContextFactory,
        actor: ConditionalFactory,
        critic: ConditionalFactory,
        encoder: EncoderFactory | None = None,
        loss: PPOLoss | None = None,
        lr: float = 7e-4,
        context_lr: float | None = None,
        adam_eps: float = 1e-5,
        gamma: float = 0.95,
        gae_lambda: float = 0.95,
        epochs: int = 2,
        minibatches: int = 4,
        partition: Literal["trials", "steps"] = "trials",
        reencode: Literal["minibatch", "epoch"] = "minibatch",
        bptt: int | None = None,
        normalize_observation: bool = True,
        normalize_reward: bool = True,
        normalize_advantage: bool = True,
        compile: bool = False,  # noqa: A002
        max_grad_norm: float | None = 0.5,
        lr_schedule: Literal["constant", "linear"] = "constant",
    ) -> None:
        super().__init__(max_grad_norm=max_grad_norm, lr_schedule=lr_schedule)
        for key, value in (("lr", lr), ("context_lr", context_lr), ("epochs", epochs), ("minibatches", minibatches)):
            if value is not None and value <= 0:
                raise ValueError(f"model.{key} is {value}; it must be positive")
        for key, value in (("gamma", gamma), ("gae_lambda", gae_lambda)):
            if not 0 <= value <= 1:
                raise ValueError(f"model.{key} is {value}; it must lie in [0, 1]")
        self.context, self.actor, self.critic, self.encoder = context, actor, critic, encoder
        self.loss = loss or PPOLoss()
        self.lr, self.context_lr, self.adam_eps = lr, context_lr or lr, adam_eps
        self.gamma, self.gae_lambda = gamma, gae_lambda
        self.epochs, self.minibatches = epochs, minibatches
        self.partition, self.reencode, self.bptt = partition, reencode, bptt
        self.normalize_observation, self.normalize_advantage = normalize_observation, normalize_advantage
        self.return_scale = ReturnScale(gamma) if normalize_reward else None
        self._evaluate: Callable[..., dict[str, Tensor]] = self._losses
        if compile:
            self._evaluate = torch.compile(self._losses)

    def build(self, spaces: Spaces) -> None:
        self.agent = MetaAgent(
            spaces,
            context=self.context,
            actor=self.actor,
            critic=self.critic,
            encoder=self.encoder,
            normalize_observation=self.normalize_observation,
        )

    @property
    def policy(self) -> MetaAgent:
        return self.agent

    def check(self, num_envs: int, steps: int) -> None:
        parts = num_envs if self.partition == "trials" else num_envs * steps
        if parts % self.minibatches:
            what = "data.env.num_envs" if self.partition == "trials" else "frames of a collected batch"
            raise ValueError(
                f"model.minibatches is {self.minibatches}, which does not divide the {parts} {what}; choose a divisor"
            )
        if self.bptt is not None and not 1 <= self.bptt <= steps:
            raise ValueError(f"model.bptt is {self.bptt}; a collected batch has {steps} steps, so choose 1 to {steps}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        context = list(self.agent.context.parameters())
        inside = {id(p) for p in context}
        heads = [p for p in self.agent.parameters() if id(p) not in inside]
        groups: list[dict[str, Any]] = [{"name": "heads", "params": heads, "lr": self.lr, "initial_lr": self.lr}]
        if context:
            lr = self.context_lr
            groups.append({"name": "context", "params": context, "lr": lr, "initial_lr": lr})
        return torch.optim.Adam(groups, eps=self.adam_eps, fused=True)

    def learn(self, batch: TensorDict) -> list[dict[str, Tensor]]:
        data = self._estimate(batch)
        learn = self._learn_epoch if self.reencode == "minibatch" else self._learn_epoch_encoded_once
        updates = [update for _ in range(self.epochs) for update in learn(data)]
        self.agent.observe(batch)  # only now: acting and learning on one batch see the same statistics
        return updates

    def returns(self, batch: TensorDict, prefix: str) -> dict[str, Tensor]:
        return episode_returns(batch, prefix)

    @torch.no_grad()
    def _estimate(self, batch: TensorDict) -> dict[str, Tensor]:
        """Everything that the updates read, with advantages and value targets, as entries `[num_envs, time, ...]`."""
        reward, done, terminated = (batch["next", key] for key in ("reward", "done", "terminated"))
        if self.return_scale is not None:
            reward = self.return_scale(reward, done)
        value = batch["state_value"]
        advantage, target = vec_generalized_advantage_estimate(
            self.gamma, self.gae_lambda, value, self._next_value(batch), reward, done, terminated
        )
        if self.normalize_advantage:
            _, mean, variance = moments_over_ranks(advantage)
            advantage = ((advantage - mean) / (variance.sqrt() + 1e-5)).to(value.dtype)
        return {
            **{key: batch[key] for key in INPUTS},
            "hidden": batch["hidden"],
            "action": batch["action"],
            "log_prob": batch["log_prob"],
            "old_value": value.squeeze(-1),
            "advantage": advantage.squeeze(-1),
            "target": target.squeeze(-1),
        }

    def _next_value(self, batch: TensorDict) -> Tensor:
        """Values after each step: the next step's, or the last observation's where a trial or the batch is cut."""
        done, terminated, value = batch["next", "done"], batch["next", "terminated"], batch["state_value"]
        after = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
        cut = done.clone()
        cut[:, -1] = True
        rows, steps = (cut & ~terminated).squeeze(-1).nonzero(as_tuple=True)
        if len(rows):
            last = {key: batch["next", key][rows, steps].unsqueeze(1) for key in INPUTS}
            c, _ = self.agent.contexts(last, batch["next", "hidden"][rows, steps])
            after[rows, steps] = self.agent.value(self.agent.inputs(last), c).squeeze(1)
        return after

    def _minibatches(self, data: dict[str, Tensor]) -> Iterator[Tensor]:
        num_envs, steps = data["advantage"].shape
        count = num_envs if self.partition == "trials" else num_envs * steps
        # Drawn on the CPU: one generator, the same order on every device.
        yield from torch.randperm(count).to(data["advantage"].device).chunk(self.minibatches)

    def _take(self, entry: Tensor, rows: Tensor) -> Tensor:
        """The steps `[B, ...]` of a minibatch out of an entry `[num_envs, time, ...]`."""
        return entry[rows].flatten(0, 1) if self.partition == "trials" else entry.flatten(0, 1)[rows]

    def _learn_epoch(self, data: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        measured = []
        for rows in self._minibatches(data):
            part, inside = data, rows
            if self.partition == "trials":
                part = {key: entry[rows] for key, entry in data.items()}
                inside = torch.arange(len(rows), device=rows.device)
            x = self.agent.inputs(part)
            c, _ = self.agent.contexts(part, part["hidden"], self.bptt)
            losses = self._evaluate(self._take(x, inside), self._take(c, inside), *self._targets(data, rows))
            measured.append({**losses, **self.update(losses["total"])})
        return measured

    def _learn_epoch_encoded_once(self, data: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        encoded, _ = self.agent.contexts(data, data["hidden"], self.bptt)
        gathered = torch.zeros(encoded.shape, device=encoded.device)  # contiguous, whatever the encoder's layout
        measured = []
        for rows in self._minibatches(data):
            window = {key: self._take(data[key], rows).unsqueeze(1) for key in INPUTS}
            x = self.agent.inputs(window).squeeze(1)
            c = self._take(encoded.detach(), rows).requires_grad_()
            losses = self._evaluate(x, c, *self._targets(data, rows))
            measured.append({**losses, **self.update(losses["total"], groups=["heads"])})
            assert c.grad is not None
            if self.partition == "trials":
                gathered[rows] = c.grad.view_as(gathered[rows])
            else:
                gathered.view(-1, gathered.shape[-1])[rows] = c.grad
        norm = self.update((encoded * gathered).sum(), groups=["context"])
        return [{**update, **norm} for update in measured]

    def _targets(self, data: dict[str, Tensor], rows: Tensor) -> list[Tensor]:
        keys = ("action", "log_prob", "old_value", "advantage", "target")
        return [self._take(data[key], rows) for key in keys]

    def _losses(self, x: Tensor, c: Tensor, *targets: Tensor) -> dict[str, Tensor]:
        action, log_prob, old_value, advantage, target = targets
        losses: dict[str, Tensor] = self.loss(
            self.agent.policy(x, c),
            self.agent.value(x, c).squeeze(-1),
            action=action,
            log_prob=log_prob,
            old_value=old_value,
            advantage=advantage,
            target=target,
        )
        return losses
