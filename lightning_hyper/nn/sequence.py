"""Trajectory encoders behind one contract: stepped or over a window, the features are the same."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SequenceEncoder(nn.Module, ABC):
    """Features of a sequence so far.

    `forward(sequence [B, T, in], state [B, state_features] | None, reset [B, T] | None)` gives the features
    `[B, T, out_features]` and the state after the last step. A state is one flat tensor per row, all zeros when
    fresh; None means fresh. Where `reset[b, t]` is true the state is made fresh before step t is taken in.

    Attributes:
        out_features: features that come out of each step.
        state_features: size of the state.
    """

    out_features: int
    state_features: int

    @abstractmethod
    def forward(
        self, sequence: Tensor, state: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


class _Recurrent(SequenceEncoder):
    """PyTorch's recurrent layers, cut where a state is made fresh; orthogonal weights, zero bias."""

    kind: type[nn.GRU] | type[nn.LSTM]
    parts: int  # tensors in the layer's own state

    def __init__(self, in_features: int, *, hidden: int = 64, layers: int = 1) -> None:
        super().__init__()
        if hidden < 1 or layers < 1:
            raise ValueError(f"encoder: hidden is {hidden} and layers is {layers}; both must be at least 1")
        self.rnn = self.kind(in_features, hidden, layers)
        for name, parameter in self.rnn.named_parameters():
            if "weight" in name:
                nn.init.orthogonal_(parameter)
            else:
                nn.init.zeros_(parameter)
        self.out_features = hidden
        self.state_features = self.parts * layers * hidden

    def forward(
        self, sequence: Tensor, state: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        batch, steps, _ = sequence.shape
        if state is None:
            state = sequence.new_zeros(batch, self.state_features)
        cuts = [0, steps]
        if reset is not None:
            # Only here does the call depend on the data: a window is cut into as few pieces as its resets allow.
            cuts = sorted({*cuts, *reset.any(0).nonzero().flatten().tolist()})
        features = []
        by_time = sequence.transpose(0, 1)
        for start, end in pairwise(cuts):
            if reset is not None:
                state = state * ~reset[:, start : start + 1]
            y, state = self._segment(by_time[start:end], state)
            features.append(y)
        out = features[0] if len(features) == 1 else torch.cat(features)
        return out.transpose(0, 1), state

    def _segment(self, by_time: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        # state [B, parts * layers * hidden] <-> parts x [layers, B, hidden]
        split = state.unflatten(-1, (self.parts, self.rnn.num_layers, -1)).permute(1, 2, 0, 3).contiguous()
        split = split.to(self.rnn.weight_hh_l0.dtype)
        y, after = self.rnn(by_time, split[0] if self.parts == 1 else tuple(split))
        stacked = torch.stack([after] if self.parts == 1 else list(after))
        return y, stacked.permute(2, 0, 1, 3).flatten(1).to(state.dtype)


class GRU(_Recurrent):
    """Gated recurrent unit (Cho et al. 2014).

    Args:
        in_features: features of each step.
        hidden: width.
        layers: layers on top of each other.
    """

    kind, parts = nn.GRU, 1


class LSTM(_Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber 1997).

    Args:
        in_features: features of each step.
        hidden: width.
        layers: layers on top of each other.
    """

    kind, parts = nn.LSTM, 2


class Transformer(SequenceEncoder):
    """Causal transformer over the last `memory` steps of the trial, with rotary positions.

    Each block attends within a sliding window of embedded steps, so that a step's features depend on the last `memory`
    inputs alone, stepped or not. The state is those inputs' embeddings and a flag for each that it is there.

    Args:
        in_features: features of each step.
        width: width of the model; a multiple of 2 * heads.
        layers: blocks.
        heads: attention heads.
        memory: steps that a step sees, itself included.

    Source: Vaswani et al. 2017, in pre-norm form; rotary positions of Su et al. 2021.
    """

    def __init__(self, in_features: int, *, width: int = 64, layers: int = 2, heads: int = 4, memory: int = 64) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"encoder.width is {width}; it must be a multiple of 2 * heads = {2 * heads}")
        if memory < 1:
            raise ValueError(f"encoder.memory is {memory}; it must be at least 1")
        self.embed = nn.Linear(in_features, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.width, self.memory = width, memory
        self.out_features = width
        self.state_features = (memory - 1) * (width + 1)

    def forward(
        self, sequence: Tensor, state: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        batch, steps, _ = sequence.shape
        past = self.memory - 1
        if state is None:
            state = sequence.new_zeros(batch, self.state_features)
        kept, there = state[:, : past * self.width].unflatten(1, (past, self.width)), state[:, past * self.width :]
        embedded = torch.cat([kept, self.embed(sequence)], 1)
        alive = torch.cat([there > 0.5, there.new_ones(batch, steps, dtype=torch.bool)], 1)
        fresh = torch.zeros_like(alive)
        if reset is not None:
            fresh[:, past:] = reset
        trial = fresh.long().cumsum(1)  # positions of one number belong to one trial
        features = self._attend(embedded, alive, trial, steps)
        # Positions of an earlier trial than the last step's are no longer there.
        tail = embedded.shape[1] - past
        alive = (alive & (trial == trial[:, -1:]))[:, tail:].to(embedded.dtype)
        left = torch.cat([(embedded[:, tail:] * alive.unsqueeze(-1)).flatten(1), alive], 1)
        return features, left

    def _attend(self, embedded: Tensor, alive: Tensor, trial: Tensor, steps: int) -> Tensor:
        # Every step gets a window of its own, [B, steps, memory]: what deeper blocks compute for a past position
        # must not depend on what lay before that window.
        size = self.memory
        windows = embedded.unfold(1, size, 1).transpose(2, 3)
        visible = alive.unfold(1, size, 1) & (trial.unfold(1, size, 1) == trial[:, -steps:, None])
        x = windows.flatten(0, 1)
        causal = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
        mask = visible.flatten(0, 1)[:, None, None, :] & causal
        # A position that sees nothing would give NaN; it sees itself, and nobody sees it.
        mask = mask | torch.eye(size, dtype=torch.bool, device=x.device)
        for block in self.blocks:
            x = block(x, mask)
        last: Tensor = self.norm(x[:, -1])
        return cast(Tensor, last.unflatten(0, (-1, steps)))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(_rotate(q), _rotate(k), v, attn_mask=mask)
        x = x + cast(Tensor, self.out(attended.transpose(1, 2).flatten(-2)))
        return x + cast(Tensor, self.feed(self.between(x)))


def _rotate(x: Tensor) -> Tensor:
    """Rotary positions along the second last dimension of `[..., T, features]`."""
    steps, features = x.shape[-2:]
    rates = torch.exp(torch.arange(0, features, 2, device=x.device) * (-math.log(10_000.0) / features))
    angles = torch.arange(steps, device=x.device)[:, None] * rates
    a, b = x.unflatten(-1, (2, -1)).unbind(-2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
