"""A context from what was seen so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from lightning_hyper.checks import Range, RecipeError, Width, at, checked
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.modules.context import FEATURES, Contexts, ContextSource, Role, Window
from lightning_hyper.nn import GRU, SequenceEncoder, VectorEncoder

Embedding = Annotated[int, Range(0, 16_384)]


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

    @checked
    def __init__(
        self,
        spaces: Spaces,
        features: int,
        *,
        encoder: Callable[[int], SequenceEncoder] = GRU,
        code: Width | None = None,
        observation_embedding: Embedding = 32,
        action_embedding: Embedding = 8,
        reward_embedding: Embedding = 8,
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
        with at("encoder"):
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
