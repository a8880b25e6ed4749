"""Context sources: what an agent knows about its task, for every step of a window."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from lightning_hyper.checks import Width, checked
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.nn import grouped

Window: TypeAlias = Mapping[str, Tensor] | TensorDictBase
"""Entries `[num_envs, time, ...]` by the names that `lightning_hyper.envs.keys` lists."""

FEATURES = "features"  # entry of a window under which an agent puts what its encoder makes of the observation

Role = Literal["decide", "retrieve"]


@dataclass
class Contexts:
    """Contexts of steps: one for each, or a few that many steps share.

    Attributes:
        values: `[*B, features]`; the distinct ones `[K, features]` where there is an index.
        index: which of them is that of each step, `[*B]`; None where each step has its own.
    """

    values: Tensor
    index: Tensor | None = None

    def each(self) -> Tensor:
        """One context for each step, `[*B, features]`."""
        return self.values if self.index is None else self.values[self.index]

    def condition(self, network: nn.Module, x: Tensor) -> Tensor:
        """f(x | c) `[*B, out]` for inputs `[*B, in]`; what a shared context gives rise to is made once."""
        if self.index is None:
            return cast(Tensor, network(x, self.values))
        if not getattr(network, "uses_context", True):
            return cast(Tensor, network(x, x[..., :0]))
        lead = x.shape[:-1]
        out = grouped(network, x.reshape(-1, x.shape[-1]), self.values, self.index.reshape(-1))
        return out.view(*lead, out.shape[-1])

    def flat(self, rows: Tensor | None = None) -> Contexts:
        """The steps in one row, `[B]` after `[n, t]`; those of `rows` `[K]` alone where given."""
        index = self.index
        if index is not None:
            index = index.reshape(-1)
            return Contexts(self.values, index if rows is None else index[rows])
        values = self.values.flatten(0, -2)
        return Contexts(values if rows is None else values[rows])

    def map(self, network: nn.Module) -> Contexts:
        """The same steps with every context put through a network."""
        return Contexts(network(self.values), self.index)


def state_before(window: Window) -> Tensor:
    """A source's state `[num_envs, state_features]` before a collected window, which may have that of every step."""
    state = window["context_state"]
    return state if state.ndim == 2 else state[:, 0]


def chained(first: Contexts, second: Contexts) -> Contexts:
    """The steps `[A]` of the first and then those `[B]` of the second, in one row."""
    if first.index is None or second.index is None:
        return Contexts(torch.cat([first.each(), second.each()]))
    index = torch.cat([first.index, second.index + len(first.values)])
    return Contexts(torch.cat([first.values, second.values]), index)


class ContextSource(nn.Module, ABC):
    """Turns a window of experience into contexts; may carry a state from window to window.

    A recipe's source is made from `(spaces, features)`: the sizes of the environment, and how many features the
    agent's encoder gives, which the window has under `features`.

    Attributes:
        out_features: features of a context.
        state_features: features of the carried state, 0 for none.
        in_keys: entries of a window that it reads, `features` apart.
        told: whether it reads the task itself, which has to be given to an agent outside of training.
        has_roles: whether its contexts differ by role.
    """

    out_features: int
    state_features: int = 0
    in_keys: Sequence[str] = ()
    told: bool = False
    has_roles: bool = False

    @abstractmethod
    def forward(self, window: Window, state: Tensor | None, role: Role = "decide") -> tuple[Contexts, Tensor | None]:
        """Contexts of the steps `[num_envs, time]`, and the state `[num_envs, state_features]` after the window.

        Args:
            window: entries `[num_envs, time, ...]`.
            state: that before the window; None means fresh. Sources without one give None back.
            role: what the context is for; sources that have no use for it ignore it.
        """

    def update_statistics(self, window: Window) -> None:
        """Take a collected batch into running statistics, where there are any."""

    @property
    def inferred(self) -> InferredContext | None:
        """Itself, or the one of its parts, that is trained by an objective of its own; None where there is none."""
        return None


class InferredContext(ContextSource):
    """A source that the return does not train, but an objective of its own, on whole trials that are kept.

    Attributes:
        trial_keys: entries of each step of a trial that its objective reads.
        updates: that it wants after each collected batch.
        trials: that an update looks at.
        capacity: whole trials that are to be kept.
        lr: learning rate.
    """

    trial_keys: Sequence[str]
    updates: int
    trials: int
    capacity: int
    lr: float

    @property
    def inferred(self) -> InferredContext:
        return self

    @abstractmethod
    def objective(self, trials: dict[str, Tensor], lengths: Tensor) -> dict[str, Tensor]:
        """What is to be made small, `total`, and its parts.

        Args:
            trials: entries `trial_keys` of whole trials, `[B, steps, ...]`.
            lengths: steps of each, `[B]`; what lies behind is not looked at.
        """


class ConstantContext(ContextSource):
    """Learned numbers, the same at every step: a control that tells of nothing.

    Args:
        spaces: sizes of the environment.
        features: features of the agent's encoder.
        size: how many numbers.

    Source: arXiv 2106.06842's code has five.
    """

    in_keys = ("is_init",)

    @checked
    def __init__(self, spaces: Spaces, features: int, *, size: Width = 5) -> None:
        super().__init__()
        self.numbers = nn.Parameter(torch.rand(1, size))
        self.out_features = size

    def forward(self, window: Window, state: Tensor | None, role: Role = "decide") -> tuple[Contexts, Tensor | None]:
        first = window["is_init"].squeeze(-1)
        return Contexts(self.numbers, torch.zeros_like(first, dtype=torch.int64)), None


ContextFactory = Callable[[Spaces, int], ContextSource]
# The list first: jsonargparse writes a resolved recipe by the first type that looks like it.
ContextFactories = list[ContextFactory] | ContextFactory | None
