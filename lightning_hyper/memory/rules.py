"""Rules of a memory: what enters, and what leaves for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from tensordict import TensorDict
from torch import Tensor

from lightning_hyper.checks import RecipeError


class Rule(ABC):
    """Chooses which new steps go to which places of a memory; indices are on the CPU."""

    def begin(self, capacity: int, tasks: Sequence[str]) -> None:  # noqa: B027  most rules fit everywhere
        """Raise RecipeError where the rule does not fit a memory of so many places, or the environment's tasks."""

    @abstractmethod
    def choose(
        self, new: TensorDict, held: TensorDict, stamps: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Places that are written `[K]`, each at most once, and rows of `new` that go there `[K]`.

        Args:
            new: steps `[N]`, N at least 1, in the order in which they were taken.
            held: the memory's entries `[capacity]`; what was never written is zero.
            stamps: when each place was written, `[capacity]`, from 1; 0 for never.
            generator: what is left to chance is drawn from it.
        """


class Uniform(Rule):
    """As many draws with replacement from the new steps as there are, over the oldest entries.

    Source: arXiv 2306.10698.
    """

    def choose(
        self, new: TensorDict, held: TensorDict, stamps: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        count = min(len(new), len(stamps))
        return oldest(stamps, count), torch.randint(len(new), (count,), generator=generator)


class Newest(Rule):
    """The newest steps, over the oldest entries."""

    def choose(
        self, new: TensorDict, held: TensorDict, stamps: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        count = min(len(new), len(stamps))
        return oldest(stamps, count), torch.arange(len(new) - count, len(new))


class BestReturn(Rule):
    """The steps of the episodes with the highest return, new or held; of equal ones the new."""

    def choose(
        self, new: TensorDict, held: TensorDict, stamps: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        offered = new["episode_return"].cpu()
        returns = torch.cat([offered, held["episode_return"].cpu().masked_fill(stamps == 0, -torch.inf)])
        # Stable, and the new ones first: of equal returns the new stay.
        best = returns.argsort(descending=True, stable=True)[: len(stamps)]
        entering = best[best < len(new)]
        stays = torch.zeros(len(stamps), dtype=torch.bool)
        stays[best[best >= len(new)] - len(new)] = True
        return (~stays).nonzero().squeeze(-1)[: len(entering)], entering


class TaskQuota(Rule):
    """As `Uniform`, with an equal share of the places for each task that is an index."""

    def begin(self, capacity: int, tasks: Sequence[str]) -> None:
        if not 0 < len(tasks) <= capacity:
            raise RecipeError(
                f"model.memory.capacity is {capacity}; with the rule TaskQuota it must be at least one for each of "
                f"data.env's indexed tasks, of which there are {len(tasks)}"
            )
        self.tasks = len(tasks)

    def choose(
        self, new: TensorDict, held: TensorDict, stamps: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        task, places, rows = new["task"].cpu(), [], []
        for k in range(self.tasks):
            own, offered = torch.arange(k, len(stamps), self.tasks), (task == k).nonzero().squeeze(-1)
            count = min(len(offered), len(own))
            if count:
                places.append(own[oldest(stamps[own], count)])
                rows.append(offered[torch.randint(len(offered), (count,), generator=generator)])
        return torch.cat(places), torch.cat(rows)


def oldest(stamps: Tensor, count: int) -> Tensor:
    """Places of the `count` oldest entries, unwritten ones first."""
    return stamps.argsort(stable=True)[:count]
