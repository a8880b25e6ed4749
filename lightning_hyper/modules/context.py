"""Context sources: what an agent knows about its task, as one vector per step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from lightning_hyper.modules.normalization import RunningNorm
from lightning_hyper.modules.spaces import Spaces
from lightning_hyper.nn import GRU, SequenceEncoder, VectorEncoder

Window: TypeAlias = Mapping[str, Tensor] | TensorDictBase
"""Entries `[num_envs, time, ...]` by the names that `lightning_hyper.envs` lists."""


def observed(window: Window) -> Tensor:
    """Observation and end-of-episode flag, `[num_envs, time, observation + 1]`."""
    return torch.cat([window["observation"], window["episode_done"]], -1)


class ContextSource(nn.Module, ABC):
    """Turns a window of experience into contexts; may carry a state from window to window.

    Attributes:
        out_features: features of a context.
        state_features: features of the carried state, 0 for none.
        uses_task: whether it reads `task`, which only an oracle may.
    """

    out_features: int
    state_features: int = 0
    uses_task: bool = False

    @abstractmethod
    def forward(self, window: Window, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Contexts `[num_envs, time, out_features]` and the state `[num_envs, state_features]` after the window.

        `state` is that before the window; None means fresh.
        """

    def observe(self, window: Window) -> None:
        """Take a collected batch into running statistics, where there are any."""


class RecurrentContext(ContextSource):
    """A code of the trial so far: a sequence encoder over (observation, previous action, previous reward).

    Args:
        spaces: sizes of the environment.
        encoder: makes the sequence encoder from its number of inputs.
        code: half the features of the code, which is (mu, logvar) in the paper; null gives the encoder's own features.
        embed: width of a tanh layer from the code to the context, shared by actor and critic; 0 for none.
        observation_embedding: width of the ReLU embedding of the observation; 0 leaves it out.
        action_embedding: the same for the previous action (one-hot where it is an index).
        reward_embedding: the same for the previous reward.
        first_step: what the encoder is fed at the first step of a trial: the first `observation`, with zero action
            and reward; or `zero`, as in the published code: only zeros, and the state stays zero.

    Source: arXiv 2309.14970, the skeleton shared by all its methods.
    """

    def __init__(
        self,
        spaces: Spaces,
        *,
        encoder: Callable[[int], SequenceEncoder] = GRU,
        code: int | None = 5,
        embed: int = 0,
        observation_embedding: int = 32,
        action_embedding: int = 0,
        reward_embedding: int = 8,
        first_step: Literal["observation", "zero"] = "observation",
    ) -> None:
        super().__init__()
        if first_step not in ("observation", "zero"):
            raise ValueError(f"context.first_step is {first_step!r}; it must be 'observation' or 'zero'")
        self.spaces, self.first_step = spaces, first_step
        inputs = {
            "observation": (spaces.observation + 1, observation_embedding),
            "action": (spaces.actions, action_embedding),
            "reward": (1, reward_embedding),
        }
        self.embeddings = nn.ModuleDict(
            {
                name: VectorEncoder(size, widths=(width,), activation="relu")
                for name, (size, width) in inputs.items()
                if width
            }
        )
        if not self.embeddings:
            raise ValueError("context: every embedding is 0, so the encoder would see nothing; give one a width")
        self.encoder = encoder(sum(width for _, width in inputs.values()))
        self.state_features = self.encoder.state_features
        self.out_features = self.encoder.out_features
        self.code: nn.Module = nn.Identity()
        if code is not None:
            self.code = nn.Linear(self.out_features, 2 * code)
            self.out_features = 2 * code
        self.embed: nn.Module = nn.Identity()
        if embed:
            self.embed = VectorEncoder(self.out_features, widths=(embed,), activation="tanh")
            self.out_features = embed

    def forward(self, window: Window, state: Tensor | None) -> tuple[Tensor, Tensor]:
        sources = {
            "observation": observed(window),
            "action": self._previous_action(window),
            "reward": window["previous_reward"],
        }
        inputs = torch.cat([embed(sources[name]) for name, embed in self.embeddings.items()], -1)
        reset = window["is_init"].squeeze(-1)
        if self.first_step == "zero":
            inputs = inputs * ~window["is_init"]
            after_first = torch.cat([torch.zeros_like(reset[:, :1]), reset[:, :-1]], 1)
            features, state = self.encoder(inputs, state, reset | after_first)
            state = state * ~window["is_init"][:, -1]
        else:
            features, state = self.encoder(inputs, state, reset)
        return self.embed(self.code(features)), state

    def _previous_action(self, window: Window) -> Tensor:
        # At the first step there is no previous action: all zeros, not the one-hot of action 0.
        return self.spaces.action_features(window["previous_action"]) * ~window["is_init"]


class OracleContext(ContextSource):
    """The task itself, standardised: an upper bound for what any memory can give.

    Args:
        spaces: sizes of the environment.
        embed: width of a tanh layer from the task to the context; 0 for none.
        normalize: standardise the task by running statistics.

    Source: arXiv 2309.14970, Multi and Multi+HN.
    """

    uses_task = True

    def __init__(self, spaces: Spaces, *, embed: int = 0, normalize: bool = True) -> None:
        super().__init__()
        self.norm: nn.Module = RunningNorm(spaces.task) if normalize else nn.Identity()
        self.embed: nn.Module = nn.Identity()
        self.out_features = spaces.task
        if embed:
            self.embed = VectorEncoder(spaces.task, widths=(embed,), activation="tanh")
            self.out_features = embed

    def forward(self, window: Window, state: Tensor | None) -> tuple[Tensor, Tensor]:
        task = cast(Tensor, window["task"])
        if state is None:
            state = task.new_zeros(len(task), 0)
        return self.embed(self.norm(task)), state

    def observe(self, window: Window) -> None:
        if isinstance(self.norm, RunningNorm):
            self.norm.update(window["task"])


ContextFactory = Callable[[Spaces], ContextSource]
