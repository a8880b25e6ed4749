"""A belief over the task: a recurrent code that is trained to tell of the trial, not by the return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_hyper.checks import Count, NonNegative, Rate, RecipeError, Width, at, checked
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.modules.context import Contexts, InferredContext, Role, Window, state_before
from lightning_hyper.modules.decoders import Decoder, DecoderFactory, RewardDecoder
from lightning_hyper.modules.normalization import RunningNorm
from lightning_hyper.modules.recurrent_context import Embedding, RecurrentContext
from lightning_hyper.nn import GRU, SequenceEncoder


class VariationalContext(RecurrentContext, InferredContext):
    """The mean and log-variance of a belief over a latent, after each step of the trial.

    Its encoder is that of `RecurrentContext`. It is not trained by the return, but on whole trials that the algorithm
    keeps: from the latent at each step the decoders are to tell all transitions of the trial, those before and those
    to come, and no step may change the belief more than that pays for. The policy is given mean and log-variance,
    standardised by running statistics.

    Args:
        spaces: sizes of the environment.
        features: features of the agent's encoder, which it does not see.
        latent: numbers of the latent; a context has twice as many.
        decoders: make what is to be told; the reward of each transition by default.
        kl: weight of the divergence of each step's belief from the one before, the first from a standard normal.
        updates: of the encoder and the decoders, after each collected batch.
        trials: that an update looks at.
        capacity: whole trials that are kept.
        lr: learning rate of encoder and decoders.
        normalize: standardise the context.
        summed_kl: sum the divergence over the trials of an update, where the reconstruction is a mean, as the
            published code does: its weight is `trials` times `kl` there.
        encoder, observation_embedding, action_embedding, reward_embedding, first_step: as in `RecurrentContext`.

    Raises:
        RecipeError: observations are images, nothing is to be told, or fewer trials are kept than an update looks at.

    Source: VariBAD (Zintgraf et al. 2020, arXiv 1910.08348); VI and VI+HN of arXiv 2309.14970.
    """

    @checked
    def __init__(
        self,
        spaces: Spaces,
        features: int,
        *,
        latent: Width = 5,
        decoders: Sequence[DecoderFactory] | None = None,
        kl: NonNegative = 1.0,
        updates: Count = 3,
        trials: Count = 25,
        capacity: Count = 10_000,
        lr: Rate = 1e-3,
        normalize: bool = True,
        summed_kl: bool = False,
        encoder: Callable[[int], SequenceEncoder] = GRU,
        observation_embedding: Embedding = 32,
        action_embedding: Embedding = 8,
        reward_embedding: Embedding = 8,
        first_step: Literal["observation", "zero"] = "observation",
    ) -> None:
        if spaces.is_image:
            raise RecipeError("VariationalContext reads vectors; an image has to be flattened by a wrapper first")
        super().__init__(
            spaces,
            features,
            encoder=encoder,
            code=latent,
            observation_embedding=observation_embedding,
            action_embedding=action_embedding,
            reward_embedding=reward_embedding,
            first_step=first_step,
            encoded=False,
        )
        if capacity < trials:
            raise RecipeError(f"capacity is {capacity}; it must be at least trials, {trials}")
        self.latent, self.kl, self.summed_kl = latent, kl, summed_kl
        self.updates, self.trials, self.capacity, self.lr = updates, trials, capacity, lr
        self.norm = RunningNorm(2 * latent) if normalize else None
        made: list[Decoder] = []
        for k, make in enumerate([RewardDecoder] if decoders is None else decoders):
            with at(f"decoders.{k}"):
                made.append(make(spaces, latent))
        if not made:
            raise RecipeError("decoders is an empty list; a belief that has nothing to tell learns nothing: name one")
        self.decoders = nn.ModuleList(made)
        keys = [*self.in_keys, *(key for decoder in made for key in decoder.in_keys)]
        self.trial_keys = list(dict.fromkeys(keys))

    def forward(self, window: Window, state: Tensor | None, role: Role = "decide") -> tuple[Contexts, Tensor | None]:
        with torch.no_grad():
            contexts, state = super().forward(window, state, role)
            values = contexts.values if self.norm is None else self.norm(contexts.values)
        return Contexts(values), state

    def update_statistics(self, window: Window) -> None:
        if self.norm is not None:
            with torch.no_grad():
                contexts, _ = super().forward(window, state_before(window))
            self.norm.update(contexts.values)

    def objective(self, trials: dict[str, Tensor], lengths: Tensor) -> dict[str, Tensor]:
        """Means over trials of sums over their steps, named after the decoders; see `InferredContext`."""
        contexts, _ = super().forward(trials, None)
        mean, log_variance = contexts.values.chunk(2, -1)
        latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        steps = torch.arange(mean.shape[1], device=mean.device) < lengths.unsqueeze(1)
        pairs = steps.unsqueeze(2) & steps[:, 1:].unsqueeze(1)  # of a step's latent and a transition
        transitions = self._transitions(trials)
        losses = {}
        for decoder in self.decoders:
            error = decoder(latent, transitions)
            inside = pairs if error.ndim == 3 else steps
            name = type(decoder).__name__.removesuffix("Decoder").lower()
            losses[name] = decoder.weight * (error * inside).flatten(1).sum(1).mean()
        divergence = (step_divergence(mean, log_variance) * steps).sum(1)
        losses["kl"] = self.kl * (divergence.sum() if self.summed_kl else divergence.mean())
        return {"total": torch.stack(list(losses.values())).sum(), **losses}

    def _transitions(self, trials: dict[str, Tensor]) -> dict[str, Tensor]:
        seen = trials["observation"].float().flatten(2)
        found = {
            "before": seen[:, :-1],
            "after": seen[:, 1:],
            "action": self.spaces.action_features(trials["previous_action"][:, 1:]),
            "reward": trials["previous_reward"][:, 1:],
        }
        return {**found, "task": trials["task"][:, 0]} if "task" in trials else found


def step_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL of each step's diagonal normal `[B, steps, n]` from the one before, the first from N(0, I): `[B, steps]`."""
    before = torch.cat([torch.zeros_like(mean[:, :1]), mean[:, :-1]], 1)
    log_before = torch.cat([torch.zeros_like(mean[:, :1]), log_variance[:, :-1]], 1)
    ratio = (log_variance - log_before).exp() + (mean - before).square() * (-log_before).exp()
    return 0.5 * (ratio - 1 + log_before - log_variance).sum(-1)
