"""PPO through a trajectory encoder, over trials."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from lightning_hyper.algorithms.base import episode_returns
from lightning_hyper.algorithms.on_policy import OnPolicy
from lightning_hyper.modules import MetaAgent, Spaces
from lightning_hyper.modules.agent import INPUTS, ConditionalFactory, EncoderFactory
from lightning_hyper.modules.context import ContextFactory


class MetaPPO(OnPolicy):
    """PPO whose gradient goes through the context source: RNN, RNN+S, RNN+HN, Multi and Multi+HN by their parts.

    Args:
        context: makes the context source from the sizes of the environment.
        actor: makes the actor, a conditional network, from (inputs, context, outputs).
        critic: makes the critic.
        encoder: makes an embedding of the observation, shared by actor and critic.
        context_lr: learning rate for the context source; null for that of the others.
        partition: what a minibatch is a random part of: whole `trials` (only those are encoded again), or `steps` of
            all trials, for which all are encoded again each time, as in the published code.
        reencode: encode again for every `minibatch`, with the gradient of its loss (the paper); or once an `epoch`:
            the encoder then takes one step an epoch, on the gradients that its contexts gathered.
        bptt: steps after which the gradient through time is cut; null for the whole window.
        normalize_observation: running standardisation of what actor and critic see.
        compile: compile heads and loss with `torch.compile`; slower on CPUs.
        options: as in `OnPolicy`.

    Source: arXiv 2309.14970 (Beck et al. 2023), end-to-end methods.
    """

    def __init__(
        self,
        *,
        context: ContextFactory,
        actor: ConditionalFactory,
        critic: ConditionalFactory,
        encoder: EncoderFactory | None = None,
        context_lr: float | None = None,
        partition: Literal["trials", "steps"] = "trials",
        reencode: Literal["minibatch", "epoch"] = "minibatch",
        bptt: int | None = None,
        normalize_observation: bool = True,
        compile: bool = False,  # noqa: A002
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if context_lr is not None and context_lr <= 0:
            raise ValueError(f"model.context_lr is {context_lr}; it must be positive")
        self.context, self.actor, self.critic, self.encoder = context, actor, critic, encoder
        self.context_lr = context_lr or self.lr
        self.partition, self.reencode, self.bptt = partition, reencode, bptt
        self.normalize_observation = normalize_observation
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
        data = {**{key: batch[key] for key in (*INPUTS, "hidden")}, **self.estimate(batch)}
        learn = self._learn_epoch if self.reencode == "minibatch" else self._learn_epoch_encoded_once
        updates = [update for _ in range(self.epochs) for update in learn(data)]
        self.agent.observe(batch)  # only now: acting and learning on one batch see the same statistics
        return updates

    def returns(self, batch: TensorDict, prefix: str) -> dict[str, Tensor]:
        return episode_returns(batch, prefix)

    def value_after(self, batch: TensorDict, rows: Tensor, steps: Tensor) -> Tensor:
        last = {key: batch["next", key][rows, steps].unsqueeze(1) for key in INPUTS}
        c, _ = self.agent.contexts(last, batch["next", "hidden"][rows, steps])
        return self.agent.value(self.agent.inputs(last), c).squeeze(1)

    def _minibatches(self, data: dict[str, Tensor]) -> Iterator[Tensor]:
        num_envs, steps = data["advantage"].shape
        count = num_envs if self.partition == "trials" else num_envs * steps
        yield from self.order(count, data["advantage"].device).chunk(self.minibatches)

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
