"""Task sources: what an agent is told of its task, for the role in which it asks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hyper.modules.spaces import Spaces
from lightning_hyper.modules.text import embed_missions
from lightning_hyper.nn import MLP, Conditional

DECIDE, RETRIEVE = 0, 1
ROLES = 2


class TaskSource(nn.Module, ABC):
    """Turns the index of a mission into a context, one for each role.

    Args:
        spaces: sizes of the environment, with its tasks and missions.

    Attributes:
        out_features: features of a context.

    Raises:
        ValueError: the environment has no indexed tasks.
    """

    out_features: int
    task_of: Tensor

    def __init__(self, spaces: Spaces) -> None:
        super().__init__()
        if not spaces.missions:
            raise ValueError("model.task: data.env has no tasks with missions; MiniGrid has")
        owners = [task for task, missions in enumerate(spaces.missions) for _ in missions]
        self.register_buffer("task_of", torch.tensor(owners), persistent=False)

    @abstractmethod
    def forward(self, mission: Tensor, role: Tensor) -> Tensor:
        """Contexts `[K, out_features]` of missions `[K]` in the roles `[K]`, each `DECIDE` or `RETRIEVE`."""


class OneHotTask(TaskSource):
    """Which of the tasks it is, one-hot, through a small network.

    Args:
        spaces: sizes of the environment.
        hidden: widths of the network's hidden layers (ReLU).
        features: features that it gives; null leaves the one-hot as it is.
        role: tell the roles apart by one more input.
        init: base scheme of the network.

    Source: arXiv 2306.10698's code: n + 1 inputs, 32 hidden units, 64 features.
    """

    def __init__(
        self,
        spaces: Spaces,
        *,
        hidden: Sequence[int] = (32,),
        features: int | None = 64,
        role: bool = True,
        init: str = "default",
    ) -> None:
        super().__init__(spaces)
        self.tasks, self.role = spaces.task, role
        self.network, self.out_features = _branch(spaces.task + role, hidden, features, init)

    def forward(self, mission: Tensor, role: Tensor) -> Tensor:
        return cast(Tensor, self.network(_with_role(F.one_hot(self.task_of[mission], self.tasks), role, self.role)))


class TextTask(TaskSource):
    """The mission's text as a frozen sentence embedding, through a small network.

    Args:
        spaces: sizes of the environment.
        encoder: sentence encoder, by name or folder (see `embed_missions`).
        hidden: widths of the network's hidden layers (ReLU).
        features: features that it gives; null leaves the embedding as it is.
        role: tell the roles apart by one more input.
        init: base scheme of the network.

    Source: arXiv 2306.10698's code has one linear layer to 64 features, and an unnamed encoder.
    """

    embeddings: Tensor

    def __init__(
        self,
        spaces: Spaces,
        *,
        encoder: str = "all-MiniLM-L6-v2",
        hidden: Sequence[int] = (),
        features: int | None = 64,
        role: bool = True,
        init: str = "default",
    ) -> None:
        super().__init__(spaces)
        self.role = role
        embeddings = embed_missions([text for missions in spaces.missions for text in missions], encoder)
        self.register_buffer("embeddings", embeddings)
        self.network, self.out_features = _branch(embeddings.shape[-1] + role, hidden, features, init)

    def forward(self, mission: Tensor, role: Tensor) -> Tensor:
        return cast(Tensor, self.network(_with_role(self.embeddings[mission], role, self.role)))


class JoinedTask(TaskSource):
    """Several task sources side by side; the paper's code joins the one-hot, which tells the roles, with the text.

    Args:
        spaces: sizes of the environment.
        parts: the sources.
    """

    def __init__(self, spaces: Spaces, *, parts: Sequence[Callable[[Spaces], TaskSource]]) -> None:
        super().__init__(spaces)
        if not parts:
            raise ValueError("model.task.parts is empty; name one source or more")
        self.parts = nn.ModuleList(part(spaces) for part in parts)
        self.out_features = sum(cast(TaskSource, part).out_features for part in self.parts)

    def forward(self, mission: Tensor, role: Tensor) -> Tensor:
        return torch.cat([part(mission, role) for part in self.parts], -1)


TaskFactory = Callable[[Spaces], TaskSource]


def by_context(network: Conditional, x: Tensor, context: Tensor, index: Tensor) -> Tensor:
    """f(x | c) for rows that share few contexts, each of which is taken once: `[B, out]`.

    Args:
        network: a conditional network.
        x: `[B, in]`.
        context: the distinct contexts `[K, context]`.
        index: which of them is that of each row, `[B]`.
    """
    counts = torch.bincount(index, minlength=len(context))
    order = index.argsort(stable=True)
    first = counts.cumsum(0) - counts
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) - first[index[order]]
    rows = x.new_zeros(len(context), int(counts.max()), x.shape[-1]).index_put((index, place), x)
    return cast(Tensor, network(rows, context))[index, place]


def _branch(inputs: int, hidden: Sequence[int], features: int | None, init: str) -> tuple[nn.Module, int]:
    if features is None:
        if hidden:
            raise ValueError(f"model.task: hidden is {list(hidden)} without features; give features, or no hidden")
        return nn.Identity(), inputs
    return MLP(inputs, features, hidden=hidden, activation="relu", init=init), features


def _with_role(x: Tensor, role: Tensor, tell: bool) -> Tensor:
    return torch.cat([x, role.unsqueeze(-1)], -1).float() if tell else x.float()
