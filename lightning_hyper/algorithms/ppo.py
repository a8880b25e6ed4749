"""PPO over any context: of frames, or through a recurrent context of whole windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

from lightning_hyper.algorithms.base import Algorithm
from lightning_hyper.algorithms.inference import GROUP, Inference
from lightning_hyper.checks import Count, Positive, PositiveShare, Rate, RecipeError, checked
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.modules import ActorCritic, ReturnScale
from lightning_hyper.modules.conditioned import ConditionalFactory
from lightning_hyper.modules.context import ContextFactories, state_before
from lightning_hyper.modules.normalization import moments_over_ranks
from lightning_hyper.modules.observation import EncoderFactory
from lightning_hyper.nn import Concat
from lightning_hyper.objectives import PPOLoss

TARGETS = ("action", "log_prob", "old_value", "advantage", "target")


class PPO(Algorithm):
    """Proximal policy optimisation: a few passes of clipped updates over each collected batch.

    1. Rewards are scaled; advantages and value targets are estimated (GAE).
    2. Each of `epochs` passes makes one update for each of `minibatches` random parts of the batch.
    3. Running statistics take in the batch, so that acting and learning on it see the same ones.

    An agent whose context carries a state is trained on whole windows, with the gradient through time, and its context
    source is a parameter group of its own, clipped apart. MPPO, MPPO+task, PPOHypernet, RNN, RNN+S, RNN+HN, Multi and
    Multi+HN differ in the parts of `ActorCritic` that a recipe names.

    Args:
        actor, critic, encoder, context, embedding, decision, normalize_observation: as in `ActorCritic`.
        loss: the clipped surrogate and its weights.
        lr: learning rate of Adam.
        adam_eps: epsilon of Adam.
        context_lr: learning rate of the context source; null for that of the others.
        context_adam_eps: its epsilon; null for that of the others.
        gamma: discount per frame.
        gae_lambda: lambda of the generalised advantage estimate.
        bootstrap_truncation: count the value of the last observation where an episode is truncated; false takes a time
            limit for a terminal state.
        epochs: passes over a collected batch.
        minibatches: parts of a pass, one update each.
        partition: what a minibatch is a random part of: `steps`, or the `windows` of whole environments. Null takes
            windows where the context has a state, where all of them are encoded for each minibatch of steps.
        normalize_reward: divide rewards by the running deviation of the discounted return.
        normalize_advantage: standardise advantages over the `batch` or over each `minibatch` (of all ranks); null for
            neither.
        compile: compile heads and loss with `torch.compile`; slower on CPUs.
        max_grad_norm, lr_schedule: as in `Algorithm`.

    Source: Schulman et al. 2017 (arXiv 1707.06347); over trials arXiv 2309.14970, over many tasks arXiv 2306.10698.
    """

    @checked
    def __init__(
        self,
        *,
        actor: ConditionalFactory = Concat,
        critic: ConditionalFactory = Concat,
        encoder: EncoderFactory | None = None,
        context: ContextFactories = None,
        embedding: EncoderFactory | None = None,
        decision: ConditionalFactory | None = None,
        normalize_observation: bool = False,
        loss: PPOLoss | None = None,
        lr: Rate = 3e-4,
        adam_eps: Positive = 1e-5,
        context_lr: Rate | None = None,
        context_adam_eps: Positive | None = None,
        gamma: PositiveShare = 0.99,
        gae_lambda: PositiveShare = 0.95,
        bootstrap_truncation: bool = True,
        epochs: Count = 4,
        minibatches: Count = 4,
        partition: Literal["steps", "windows"] | None = None,
        normalize_reward: bool = False,
        normalize_advantage: Literal["batch", "minibatch"] | None = "minibatch",
        compile: bool = False,  # noqa: A002
        max_grad_norm: Positive | None = 0.5,
        lr_schedule: Literal["constant", "linear"] = "constant",
    ) -> None:
        super().__init__(max_grad_norm=max_grad_norm, lr_schedule=lr_schedule)
        self.parts: dict[str, Any] = {
            "actor": actor,
            "critic": critic,
            "encoder": encoder,
            "context": context,
            "embedding": embedding,
            "decision": decision,
            "normalize_observation": normalize_observation,
        }
        self.loss = loss or PPOLoss()
        self.lr, self.adam_eps, self.gamma, self.gae_lambda = lr, adam_eps, gamma, gae_lambda
        self.context_lr, self.context_adam_eps = context_lr, context_adam_eps
        self.bootstrap_truncation, self.epochs, self.minibatches = bootstrap_truncation, epochs, minibatches
        self.partition, self.normalize_advantage = partition, normalize_advantage
        self.return_scale = ReturnScale(gamma) if normalize_reward else None
        self._compare: Callable[..., dict[str, Tensor]] = self.compare
        if compile:
            self._compare = torch.compile(self.compare)

    def build(self, spaces: Spaces) -> None:
        self.spaces = spaces
        self.agent = ActorCritic(spaces, **self.parts)
        self.inference = Inference.of(self.agent.context)
        if self.partition is None:
            self.partition = "windows" if self.agent.state_features else "steps"
        if self.agent.context is None and (self.context_lr or self.context_adam_eps):
            raise RecipeError("model.context_lr or model.context_adam_eps is given without model.context")

    @property
    def policy(self) -> ActorCritic:
        return self.agent

    def check(self, num_envs: int, steps: int) -> None:
        parts = num_envs if self.partition == "windows" else num_envs * steps
        if parts % self.minibatches:
            what = "data.env.num_envs" if self.partition == "windows" else "frames of a collected batch"
            raise RecipeError(
                f"model.minibatches is {self.minibatches}, which does not divide the {parts} {what}; choose a divisor"
            )

    def parameter_groups(self) -> list[dict[str, Any]]:
        inferred = [] if self.inference is None else [self.inference.group()]
        apart = {id(p) for group in inferred for p in group["params"]}
        source = self.agent.context.parameters() if self.agent.context is not None else ()
        context = [p for p in source if id(p) not in apart]
        if not context or not (self.agent.state_features or self.context_lr or self.context_adam_eps):
            agent = [p for p in self.parameters() if id(p) not in apart]
            return [{"name": "agent", "params": agent, "lr": self.lr}, *inferred]
        inside = apart | {id(p) for p in context}
        heads = [p for p in self.parameters() if id(p) not in inside]
        own = {"lr": self.context_lr or self.lr, "eps": self.context_adam_eps or self.adam_eps}
        groups = [{"name": "heads", "params": heads, "lr": self.lr}, {"name": "context", "params": context, **own}]
        return [*groups, *inferred]

    def learn(self, batch: TensorDict) -> list[dict[str, Tensor]]:
        if self.return_scale is not None:
            after = batch["next"]
            scaled = self.return_scale(after["reward"], after["done"])
            batch = batch.copy().set("next", after.copy().set("reward", scaled))
        return self.improve(batch)

    def improve(self, batch: TensorDict) -> list[dict[str, Tensor]]:
        """All updates on a batch whose rewards are scaled."""
        data = {**{key: batch[key] for key in self.agent.window_keys}, **self.estimate(batch)}
        if self.agent.state_features:
            data["context_state"] = state_before(batch)
        acting = None
        if self.inference is not None:
            acting = [group["name"] for group in self.optimizer.param_groups if group["name"] != GROUP]
        measured = []
        for _ in range(self.epochs):
            for part in self.minibatched(data):
                losses = self.losses(part)
                measured.append({**losses, **self.update(losses["total"], acting)})
        self.agent.update_statistics(batch)
        return measured if self.inference is None else [*measured, *self.inference.learn(batch, self.update)]

    @torch.no_grad()
    def estimate(self, batch: TensorDict) -> dict[str, Tensor]:
        """What the losses compare with, `[num_envs, time, ...]`: actions, old values, advantages, value targets."""
        reward, done, terminated = (batch["next", key] for key in ("reward", "done", "terminated"))
        value = batch["state_value"]
        advantage, target = vec_generalized_advantage_estimate(
            self.gamma,
            self.gae_lambda,
            value,
            batch["next_value"],
            reward,
            done,
            terminated if self.bootstrap_truncation else done,
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

    def minibatched(self, data: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """The minibatches of one pass over entries `[num_envs, time, ...]`, as windows `[B, time, ...]`.

        Steps that need no window of their own come as windows of one step. Where they do, a minibatch has all windows
        and says in `rows` `[B]` which of the steps, counted by environment and time, it is about.
        """
        num_envs, steps = data["advantage"].shape
        count = num_envs if self.partition == "windows" else num_envs * steps
        # Drawn on the CPU: one generator, the same order on every device.
        order = torch.randperm(count).to(data["advantage"].device)
        if self.partition == "steps" and self.agent.state_features:
            yield from ({**data, "rows": rows} for rows in order.chunk(self.minibatches))
            return
        if self.partition == "steps":
            data = {key: entry.flatten(0, 1).unsqueeze(1) for key, entry in data.items()}
        chunks = {key: entry[order].chunk(self.minibatches) for key, entry in data.items()}
        yield from (dict(zip(chunks, parts, strict=True)) for parts in zip(*chunks.values(), strict=True))

    def losses(self, part: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a minibatch."""
        x, contexts, _ = self.agent.encode(part, part.get("context_state"))
        rows = part.get("rows")
        policy_value = self.agent.heads(self.flat(x, rows), contexts.flat(rows))
        return self._compare(*policy_value, *self.targets(part))

    @staticmethod
    def flat(entry: Tensor, rows: Tensor | None) -> Tensor:
        """The steps `[B, ...]` that a minibatch is about, of an entry `[n, time, ...]`."""
        flat = entry.flatten(0, 1)
        return flat if rows is None else flat[rows]

    def targets(self, part: dict[str, Tensor]) -> list[Tensor]:
        """What a minibatch is compared with, `[B, ...]` each, in the order of `TARGETS`."""
        targets = [self.flat(part[key], part.get("rows")) for key in TARGETS]
        if self.normalize_advantage == "minibatch":
            targets[3] = standardized(targets[3])
        return targets

    def compare(self, policy: Any, value: Tensor, *targets: Any) -> dict[str, Tensor]:
        """`PPOLoss` of a distribution `[B]` and values `[B, 1]`, with what a memory says where there is one."""
        *known, remembered = targets if len(targets) > len(TARGETS) else (*targets, None)
        losses: dict[str, Tensor] = self.loss(
            policy, value.squeeze(-1), **dict(zip(TARGETS, known, strict=True)), remembered=remembered
        )
        return losses


def standardized(advantage: Tensor) -> Tensor:
    """Mean 0 and variance 1 over everything, on all ranks together."""
    _, mean, variance = moments_over_ranks(advantage.reshape(-1, 1))
    return ((advantage - mean) / (variance.sqrt() + 1e-5)).to(advantage.dtype)
