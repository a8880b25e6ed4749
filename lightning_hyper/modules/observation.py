"""What the networks see of a step: the observation, standardised and encoded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lightning_hyper.checks import RecipeError, at
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.modules.context import Window
from lightning_hyper.modules.normalization import NoNorm, RunningNorm

EncoderFactory = Callable[[tuple[int, ...]], nn.Module]


class ObservationEncoder(nn.Module):
    """The input x of the target networks: `forward(window [*B, ...]) -> [*B, out_features]`.

    Observations of a vector are standardised where that is asked for, then encoded; in trials the flag that an episode
    has ended counts as one of their numbers. Images go through the encoder as they are, and the flag goes beside.

    Args:
        spaces: sizes of the environment.
        encoder: makes an encoder from the shape of an observation; null leaves vectors as they are.
        normalize: standardise vectors by running statistics.

    Attributes:
        out_features: features of x.
        in_keys: entries of a window that it reads.

    Raises:
        RecipeError: images without an encoder, or to be standardised.
    """

    def __init__(self, spaces: Spaces, encoder: EncoderFactory | None = None, *, normalize: bool = False) -> None:
        super().__init__()
        self.is_image, self.trials = spaces.is_image, spaces.trials
        self.in_keys: Sequence[str] = ["observation", *(["episode_done"] if spaces.trials else [])]
        shape = spaces.observation if self.is_image else (spaces.features + spaces.trials,)
        if self.is_image and (encoder is None or normalize):
            fault = "cannot be standardised: set model.normalize_observation to false"
            missing = "need model.encoder, such as ConvEncoder, or GridEncoder for MiniGrid"
            raise RecipeError(
                f"data.env shows images {spaces.observation}, which {missing if encoder is None else fault}"
            )
        self.norm = RunningNorm(shape[0]) if normalize else NoNorm()
        with at("model.encoder"):
            self.encoder = nn.Identity() if encoder is None else encoder(shape)
        features = math.prod(shape) if encoder is None else features_of(self.encoder, shape)
        self.out_features = features + (self.trials and self.is_image)

    def forward(self, window: Window) -> Tensor:
        if not self.is_image:
            return cast(Tensor, self.encoder(self.norm(self._vector(window))))
        features = cast(Tensor, self.encoder(window["observation"]))
        return torch.cat([features, window["episode_done"]], -1) if self.trials else features

    def _vector(self, window: Window) -> Tensor:
        observation = window["observation"]
        return torch.cat([observation, window["episode_done"]], -1) if self.trials else observation

    def update_statistics(self, window: Window) -> None:
        """Take a collected batch into the running statistics."""
        if not self.is_image:
            self.norm.update(self._vector(window))


def features_of(encoder: nn.Module, shape: tuple[int, ...]) -> int:
    """Features that an encoder gives: its `out_features`, or found by encoding zeros."""
    if isinstance(found := getattr(encoder, "out_features", None), int):
        return found
    with torch.no_grad():
        return int(encoder(torch.zeros(1, *shape)).shape[-1])
