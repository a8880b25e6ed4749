"""Contexts that tell the task."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hyper.checks import RecipeError, Width, checked
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.modules.context import Contexts, ContextSource, Role, Window
from lightning_hyper.modules.normalization import NoNorm, RunningNorm
from lightning_hyper.modules.text import embed_missions
from lightning_hyper.nn import VectorEncoder
from lightning_hyper.nn.init import Scheme


class TaskContext(ContextSource):
    """The task's own description, standardised: an upper bound for what any memory can give.

    Args:
        spaces: sizes of the environment.
        features: features of the agent's encoder.
        normalize: standardise the task by running statistics.

    Raises:
        RecipeError: the environment shows no task that is a vector.

    Source: arXiv 2309.14970, Multi and Multi+HN.
    """

    told = True
    in_keys = ("task",)

    def __init__(self, spaces: Spaces, features: int, *, normalize: bool = True) -> None:
        super().__init__()
        if not spaces.task:
            shows = "shows the task as an index: take OneHotContext" if spaces.tasks else "shows no task"
            raise RecipeError(f"model.context: TaskContext needs a task that is a vector, and data.env {shows}")
        self.norm = RunningNorm(spaces.task) if normalize else NoNorm()
        self.out_features = spaces.task

    def forward(self, window: Window, state: Tensor | None, role: Role = "decide") -> tuple[Contexts, Tensor | None]:
        return Contexts(self.norm(window["task"])), None

    def update_statistics(self, window: Window) -> None:
        self.norm.update(window["task"])


class IndexedContext(ContextSource):
    """A context of few values: which of the tasks it is, or which of the missions' texts.

    Raises:
        RecipeError: the environment has no indexed tasks, or no texts where they are needed.
    """

    told = True
    key: Literal["task", "mission"]

    def __init__(self, spaces: Spaces) -> None:
        super().__init__()
        if not (spaces.tasks if self.key == "task" else spaces.missions):
            what = "tasks that are an index" if self.key == "task" else "texts of missions, as MiniGrid has"
            other = "; its task is a vector: take TaskContext" if spaces.task else ""
            raise RecipeError(f"model.context: {type(self).__name__} needs {what}, and data.env shows none{other}")
        self.in_keys = (self.key,)

    @abstractmethod
    def values(self, which: Tensor, role: Role) -> Tensor:
        """Contexts `[K, out_features]` of the distinct tasks or missions `[K]`."""

    def forward(self, window: Window, state: Tensor | None, role: Role = "decide") -> tuple[Contexts, Tensor | None]:
        distinct, index = torch.unique(window[self.key], return_inverse=True)
        return Contexts(self.values(distinct, role), index), None


class OneHotContext(IndexedContext):
    """Which of the tasks it is, one-hot; through a small network where `outputs` is given.

    Args:
        spaces: sizes of the environment.
        features: features of the agent's encoder.
        hidden: widths of the network's hidden layers (ReLU).
        outputs: features that it gives; null leaves the one-hot as it is.
        role: tell the roles apart by one more input, 1 to retrieve.
        init: base scheme of the network.

    Source: arXiv 2306.10698's code: n + 1 inputs, 32 hidden units, 64 features.
    """

    key = "task"

    @checked
    def __init__(
        self,
        spaces: Spaces,
        features: int,
        *,
        hidden: Sequence[Width] = (),
        outputs: Width | None = None,
        role: bool = False,
        init: Scheme = "default",
    ) -> None:
        super().__init__(spaces)
        self.tasks, self.has_roles = len(spaces.tasks), role
        self.network, self.out_features = _branch(self.tasks + role, hidden, outputs, init)

    def values(self, which: Tensor, role: Role) -> Tensor:
        return cast(Tensor, self.network(_with_role(F.one_hot(which, self.tasks), role, self.has_roles)))


class TextContext(IndexedContext):
    """The mission's text as a frozen sentence embedding; through a small network where `outputs` is given.

    Args:
        spaces: sizes of the environment.
        features: features of the agent's encoder.
        encoder: sentence encoder, by name or folder (see `embed_missions`).
        hidden: widths of the network's hidden layers (ReLU).
        outputs: features that it gives; null leaves the embedding as it is.
        role: tell the roles apart by one more input, 1 to retrieve.
        init: base scheme of the network.

    Source: arXiv 2306.10698's code has one linear layer to 64 features, and an unnamed encoder.
    """

    key = "mission"
    embeddings: Tensor

    @checked
    def __init__(
        self,
        spaces: Spaces,
        features: int,
        *,
        encoder: str = "all-MiniLM-L6-v2",
        hidden: Sequence[Width] = (),
        outputs: Width | None = 64,
        role: bool = False,
        init: Scheme = "default",
    ) -> None:
        super().__init__(spaces)
        self.has_roles = role
        embeddings = embed_missions([text for missions in spaces.missions for text in missions], encoder)
        self.register_buffer("embeddings", embeddings)
        self.network, self.out_features = _branch(embeddings.shape[-1] + role, hidden, outputs, init)

    def values(self, which: Tensor, role: Role) -> Tensor:
        return cast(Tensor, self.network(_with_role(self.embeddings[which], role, self.has_roles)))


def _branch(inputs: int, hidden: Sequence[int], outputs: int | None, init: str) -> tuple[nn.Module, int]:
    if outputs is None:
        if hidden:
            raise RecipeError(f"model.context: hidden is {list(hidden)} without outputs; give outputs, or no hidden")
        return nn.Identity(), inputs
    body: list[nn.Module] = []
    if hidden:
        encoder = VectorEncoder((inputs,), widths=hidden, activation="relu", init=init, gain=1.0)
        body, inputs = [encoder], encoder.out_features
    head = VectorEncoder((inputs,), widths=(outputs,), activation="identity", init=init, gain=1.0)
    return nn.Sequential(*body, head), outputs


def _with_role(x: Tensor, role: Role, tell: bool) -> Tensor:
    x = x.float()
    return torch.cat([x, torch.full_like(x[:, :1], float(role == "retrieve"))], -1) if tell else x
