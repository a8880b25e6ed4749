"""Decoders: what a belief over the task is asked to say, step by step of a trial."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hyper.checks import Count, NonNegative, RecipeError, Width, checked
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.nn import VectorEncoder
from lightning_hyper.nn.trunks import dense_layers

Transitions = Mapping[str, Tensor]


class Decoder(nn.Module):
    """Predicts something of each transition of a trial from a latent drawn at each of its steps.

    Args:
        weight: of its error in the objective.

    Attributes:
        in_keys: entries of a trial that it needs beyond those of a transition.
    """

    in_keys: Sequence[str] = ()

    @checked
    def __init__(self, *, weight: NonNegative = 1.0) -> None:
        super().__init__()
        self.weight = weight

    @abstractmethod
    def forward(self, latent: Tensor, transitions: Transitions) -> Tensor:
        """Errors `[B, steps, transitions]`, of every transition by the latent of every step; `[B, steps]` of the task.

        Args:
            latent: drawn at each step, `[B, steps, latent]`.
            transitions: `before`, `after` `[B, transitions, features]`, `action` `[B, transitions, actions]`, `reward`
                `[B, transitions, 1]`, and `task` `[B, features]` where a decoder asks for it.
        """


class RewardDecoder(Decoder):
    """The reward of a transition, from latent, what it led to, and, if wanted, where it began and the action.

    Args:
        spaces: sizes of the environment.
        latent: numbers of the latent.
        hidden: widths of its layers.
        embedding: width of the ReLU embedding of observations, which both share, and of that of the action.
        transition: give it the observation before and the action, too.
        loss: the squared error (`mse`), or the cross-entropy of "the reward is 1" (`bernoulli`).
        weight: as in `Decoder`.

    Source: arXiv 2309.14970's code, which follows that of VariBAD (arXiv 1910.08348).
    """

    @checked
    def __init__(
        self,
        spaces: Spaces,
        latent: int,
        *,
        hidden: Sequence[Width] = (64, 32),
        embedding: Width = 32,
        transition: bool = True,
        loss: Literal["mse", "bernoulli"] = "mse",
        weight: NonNegative = 1.0,
    ) -> None:
        super().__init__(weight=weight)
        self.loss = loss
        self.state = VectorEncoder((spaces.features,), widths=(embedding,), activation="relu")
        self.action = VectorEncoder((spaces.actions,), widths=(embedding,), activation="relu") if transition else None
        self.network = _Pairwise(latent, embedding * (3 if transition else 1), hidden, 1)

    def forward(self, latent: Tensor, transitions: Transitions) -> Tensor:
        seen = [self.state(transitions["after"])]
        if self.action is not None:
            seen += [self.state(transitions["before"]), self.action(transitions["action"])]
        said = self.network(latent, torch.cat(seen, -1)).squeeze(-1)
        return reward_error(said, transitions["reward"], self.loss)


class CellRewardDecoder(Decoder):
    """The reward of being in each cell of a grid, from the latent alone: one output for each cell.

    Args:
        spaces: sizes of the environment, whose observation is (x, y).
        latent: numbers of the latent.
        size: cells a side.
        hidden: widths of its layers.
        loss: squared error, or cross-entropy of "the reward is 1".
        weight: as in `Decoder`.

    Raises:
        RecipeError: observations are not of two numbers.

    Source: arXiv 2309.14970's code on GridNavi.
    """

    @checked
    def __init__(
        self,
        spaces: Spaces,
        latent: int,
        *,
        size: Count = 5,
        hidden: Sequence[Width] = (32, 32),
        loss: Literal["mse", "bernoulli"] = "bernoulli",
        weight: NonNegative = 1.0,
    ) -> None:
        super().__init__(weight=weight)
        if spaces.features != 2:
            raise RecipeError(
                f"CellRewardDecoder reads an observation (x, y), and this one has {spaces.features} numbers; take "
                "RewardDecoder"
            )
        self.size, self.loss = size, loss
        self.layers, width = dense_layers(latent, hidden, "relu", "default", None)
        self.head = nn.Linear(width, size * size)

    def forward(self, latent: Tensor, transitions: Transitions) -> Tensor:
        x, y = transitions["after"].round().long().clamp(0, self.size - 1).unbind(-1)
        every = self.head(self.layers(latent))
        cell = (x * self.size + y).unsqueeze(1).expand(-1, latent.shape[1], -1)
        return reward_error(every.gather(-1, cell), transitions["reward"], self.loss)


class ObservationDecoder(Decoder):
    """What a transition leads to, from latent, where it began, and the action; mean squared error over its numbers.

    Args:
        spaces: sizes of the environment.
        latent: numbers of the latent.
        hidden: widths of its layers.
        embedding: width of the ReLU embeddings of observation and action.
        weight: as in `Decoder`.
    """

    @checked
    def __init__(
        self,
        spaces: Spaces,
        latent: int,
        *,
        hidden: Sequence[Width] = (64, 32),
        embedding: Width = 32,
        weight: NonNegative = 1.0,
    ) -> None:
        super().__init__(weight=weight)
        self.state = VectorEncoder((spaces.features,), widths=(embedding,), activation="relu")
        self.action = VectorEncoder((spaces.actions,), widths=(embedding,), activation="relu")
        self.network = _Pairwise(latent, 2 * embedding, hidden, spaces.features)

    def forward(self, latent: Tensor, transitions: Transitions) -> Tensor:
        seen = torch.cat([self.state(transitions["before"]), self.action(transitions["action"])], -1)
        said: Tensor = self.network(latent, seen)
        return (said - transitions["after"].unsqueeze(1)).square().mean(-1)


class TaskDecoder(Decoder):
    """The task itself, from the latent alone; mean squared error over its numbers (one-hot where it is an index).

    Args:
        spaces: sizes of the environment.
        latent: numbers of the latent.
        hidden: widths of its layers.
        weight: as in `Decoder`.

    Raises:
        RecipeError: the environment shows no task.
    """

    in_keys = ("task",)

    @checked
    def __init__(
        self, spaces: Spaces, latent: int, *, hidden: Sequence[Width] = (32, 32), weight: NonNegative = 1.0
    ) -> None:
        super().__init__(weight=weight)
        self.kinds = len(spaces.tasks)
        features = self.kinds or spaces.task
        if not features:
            raise RecipeError("TaskDecoder has nothing to decode: the environment shows no task")
        self.layers, width = dense_layers(latent, hidden, "relu", "default", None)
        self.head = nn.Linear(width, features)

    def forward(self, latent: Tensor, transitions: Transitions) -> Tensor:
        task = transitions["task"]
        task = F.one_hot(task, self.kinds).float() if self.kinds else task
        said: Tensor = self.head(self.layers(latent))
        return (said - task.unsqueeze(1)).square().mean(-1)


DecoderFactory = Callable[[Spaces, int], Decoder]


def reward_error(said: Tensor, reward: Tensor, loss: str) -> Tensor:
    """Errors of predictions `[B, steps, transitions]` of rewards `[B, transitions, 1]`."""
    wanted = reward.squeeze(-1).unsqueeze(1).expand_as(said)
    if loss == "bernoulli":
        return F.binary_cross_entropy_with_logits(said, (wanted == 1).to(said.dtype), reduction="none")
    return (said - wanted).square()


class _Pairwise(nn.Module):
    """A network of every pair of a latent `[B, T, latent]` and a transition `[B, I, features]`: `[B, T, I, out]`.

    Its first layer is a sum of two, so that neither is repeated for each partner.
    """

    def __init__(self, latent: int, features: int, hidden: Sequence[int], out: int) -> None:
        super().__init__()
        first, *rest = *hidden, out
        self.of_latent, self.of_transition = nn.Linear(latent, first), nn.Linear(features, first, bias=False)
        self.layers, width = dense_layers(first, rest[:-1], "relu", "default", None)
        self.head = nn.Linear(width, out)

    def forward(self, latent: Tensor, transition: Tensor) -> Tensor:
        both = self.of_latent(latent).unsqueeze(2) + self.of_transition(transition).unsqueeze(1)
        y: Tensor = self.head(self.layers(torch.relu(both)))
        return y
