"""Context sources: what an agent knows about its task, for every step of a window."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hyper.checks import RecipeError
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.modules.normalization import NoNorm, RunningNorm
from lightning_hyper.modules.text import embed_missions
from lightning_hyper.nn import GRU, SequenceEncoder, VectorEncoder, grouped

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


class RecurrentContext(ContextSource):
    """A code of the episode or trial so far: a sequence encoder over (observation, previous action, previous reward).

    Args:
        spaces: sizes of the environment.
        features: features of the agent's encoder.
        encoder: makes the sequence encoder from its number of inputs.
        code: half the features of the code, which is (mu, logvar) in the paper; null gives the encoder's own features.
        observation_embedding: width of the ReLU embedding of the observation; 0 leaves it out.
        action_embedding: the same for the previous action (one-hot where it is an index).
        reward_embedding: the same for the previous reward.
        first_step: what the encoder is fed at the first step of a trial: the first `observation`, with zero action
            and reward; or `zero`, as in the published code: only zeros, the state stays zero, and the first code gets
            no gradient.
        encoded: feed it the agent's encoded observation instead of the raw one; null does so for images.

    Source: arXiv 2309.14970, the skeleton shared by all its methods.
    """

    def __init__(
        self,
        spaces: Spaces,
        features: int,
        *,
        encoder: Callable[[int], SequenceEncoder] = GRU,
        code: int | None = None,
        observation_embedding: int = 32,
        action_embedding: int = 8,
        reward_embedding: int = 8,
        first_step: Literal["observation", "zero"] = "observation",
        encoded: bool | None = None,
    ) -> None:
        super().__init__()
        self.spaces, self.first_step = spaces, first_step
        self.encoded = spaces.is_image if encoded is None else encoded
        seen = features if self.encoded else spaces.features
        inputs = {
            "observation": (seen + spaces.trials, observation_embedding),
            "action": (spaces.actions, action_embedding),
            "reward": (1, reward_embedding),
        }
        self.embeddings = nn.ModuleDict(
            {
                name: VectorEncoder((size,), widths=(width,), activation="relu")
                for name, (size, width) in inputs.items()
                if width
            }
        )
        if not self.embeddings:
            raise RecipeError("model.context: every embedding is 0, so the encoder would see nothing; give one a width")
        self.in_keys = ["is_init", "observation", "previous_action", "previous_reward"]
        self.in_keys += ["episode_done"] if spaces.trials else []
        self.encoder = encoder(sum(width for _, width in inputs.values()))
        self.state_features = self.encoder.state_features
        self.out_features = self.encoder.out_features
        self.code: nn.Module = nn.Identity()
        if code is not None:
            self.code = nn.Linear(self.out_features, 2 * code)
            self.out_features = 2 * code

    def forward(self, window: Window, state: Tensor | None, role: Role = "decide") -> tuple[Contexts, Tensor | None]:
        first = window["is_init"]
        inputs = torch.cat([embed(self._input(name, window)) for name, embed in self.embeddings.items()], -1)
        reset = first.squeeze(-1)
        if self.first_step == "zero":
            inputs = inputs * ~first
            after_first = torch.cat([torch.zeros_like(reset[:, :1]), reset[:, :-1]], 1)
            features, state = self.encoder(inputs, state, reset | after_first)
            state = state * ~first[:, -1]
            code = self.code(features)
            return Contexts(torch.where(first, code.detach(), code)), state
        features, state = self.encoder(inputs, state, reset)
        return Contexts(self.code(features)), state

    def _input(self, name: str, window: Window) -> Tensor:
        if name == "reward":
            return window["previous_reward"]
        if name == "action":
            # At the first step there is no previous action: all zeros, not the one-hot of action 0.
            return self.spaces.action_features(window["previous_action"]) * ~window["is_init"]
        seen = window[FEATURES] if self.encoded else window["observation"].float().flatten(2)
        return torch.cat([seen, window["episode_done"]], -1) if self.spaces.trials else seen


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

    def __init__(
        self,
        spaces: Spaces,
        features: int,
        *,
        hidden: Sequence[int] = (),
        outputs: int | None = None,
        role: bool = False,
        init: str = "default",
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

    def __init__(
        self,
        spaces: Spaces,
        features: int,
        *,
        encoder: str = "all-MiniLM-L6-v2",
        hidden: Sequence[int] = (),
        outputs: int | None = 64,
        role: bool = False,
        init: str = "default",
    ) -> None:
        super().__init__(spaces)
        self.has_roles = role
        embeddings = embed_missions([text for missions in spaces.missions for text in missions], encoder)
        self.register_buffer("embeddings", embeddings)
        self.network, self.out_features = _branch(embeddings.shape[-1] + role, hidden, outputs, init)

    def values(self, which: Tensor, role: Role) -> Tensor:
        return cast(Tensor, self.network(_with_role(self.embeddings[which], role, self.has_roles)))


class ConstantContext(ContextSource):
    """Learned numbers, the same at every step: a control that tells of nothing.

    Args:
        spaces: sizes of the environment.
        features: features of the agent's encoder.
        size: how many numbers.

    Source: arXiv 2106.06842's code has five.
    """

    in_keys = ("is_init",)

    def __init__(self, spaces: Spaces, features: int, *, size: int = 5) -> None:
        super().__init__()
        if size < 1:
            raise RecipeError(f"model.context.size is {size}; it must be at least 1")
        self.numbers = nn.Parameter(torch.rand(1, size))
        self.out_features = size

    def forward(self, window: Window, state: Tensor | None, role: Role = "decide") -> tuple[Contexts, Tensor | None]:
        first = window["is_init"].squeeze(-1)
        return Contexts(self.numbers, torch.zeros_like(first, dtype=torch.int64)), None


ContextFactory = Callable[[Spaces, int], ContextSource]
# The list first: jsonargparse writes a resolved recipe by the first type that looks like it.
ContextFactories = list[ContextFactory] | ContextFactory | None


class JoinedContext(ContextSource):
    """Several sources side by side.

    Args:
        spaces: sizes of the environment.
        features: features of the agent's encoder.
        parts: make the sources.
    """

    def __init__(self, spaces: Spaces, features: int, *, parts: Sequence[ContextFactory]) -> None:
        super().__init__()
        if not parts:
            raise RecipeError("model.context.parts is empty; name one source or more")
        self.parts = nn.ModuleList(part(spaces, features) for part in parts)
        self.out_features = sum(part.out_features for part in self.sources)
        self.state_features = sum(part.state_features for part in self.sources)
        self.in_keys = list(dict.fromkeys(key for part in self.sources for key in part.in_keys))
        self.told = any(part.told for part in self.sources)
        self.has_roles = any(part.has_roles for part in self.sources)
        self._indexed = [part for part in self.sources if isinstance(part, IndexedContext)]
        self._missions = sum(map(len, spaces.missions))

    @property
    def sources(self) -> list[ContextSource]:
        """The parts."""
        return [cast(ContextSource, part) for part in self.parts]

    def forward(self, window: Window, state: Tensor | None, role: Role = "decide") -> tuple[Contexts, Tensor | None]:
        if len(self._indexed) == len(self.parts):
            return self._joined_index(window, role), None
        sizes = [part.state_features for part in self.sources]
        states = [None] * len(sizes) if state is None else state.split(sizes, -1)
        given, after = [], []
        for part, before in zip(self.sources, states, strict=True):
            contexts, left = part(window, before if part.state_features else None, role)
            given.append(contexts.each())
            after += [] if left is None else [left]
        return Contexts(torch.cat(given, -1)), torch.cat(after, -1) if after else None

    def _joined_index(self, window: Window, role: Role) -> Contexts:
        keys = {part.key for part in self._indexed}
        if len(keys) == 1:
            distinct, index = torch.unique(window[next(iter(keys))], return_inverse=True)
            which = dict.fromkeys(keys, distinct)
        else:
            pairs = window["task"] * self._missions + window["mission"]
            distinct, index = torch.unique(pairs, return_inverse=True)
            which = {"task": distinct // self._missions, "mission": distinct % self._missions}
        return Contexts(torch.cat([part.values(which[part.key], role) for part in self._indexed], -1), index)

    def update_statistics(self, window: Window) -> None:
        for part in self.sources:
            part.update_statistics(window)


def make_context(context: ContextFactories, spaces: Spaces, features: int) -> ContextSource | None:
    """The source that a recipe names; several in a list are joined, null is none."""
    if context is None or callable(context):
        return None if context is None else context(spaces, features)
    return JoinedContext(spaces, features, parts=context)


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
