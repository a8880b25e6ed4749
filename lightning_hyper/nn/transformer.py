"""A causal transformer as a sequence encoder, with the keys and values of past steps as its state."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hyper.checks import Count, Layers, RecipeError, Width, checked
from lightning_hyper.nn.sequence import Features, Reset, SequenceEncoder, State, Steps


class Transformer(SequenceEncoder):
    """Causal transformer over a trial, each block of which sees the last `memory` steps, with rotary positions.

    The state is what a block needs of the past: keys and values of the last `memory - 1` steps for each block, and a
    flag for each step that it is there. Keys are kept unrotated, since rotary attention depends on distances alone.

    Args:
        in_features: features of each step.
        width: width of the model; a multiple of 2 * heads.
        layers: blocks.
        heads: attention heads.
        memory: steps that a block sees, the step itself included; through several blocks a step's features depend on
            up to layers * (memory - 1) steps before it.

    Raises:
        RecipeError: a size that is not positive, or a width that heads do not divide.

    Source: Vaswani et al. 2017, in pre-norm form; rotary positions of Su et al. 2021.
    """

    @checked
    def __init__(
        self, in_features: int, *, width: Width = 64, layers: Layers = 2, heads: Width = 4, memory: Count = 64
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise RecipeError(f"width is {width}; it must be a multiple of 2 * heads = {2 * heads}")
        self.embed = nn.Linear(in_features, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.width, self.memory = width, memory
        self.out_features = width
        self.state_features = (memory - 1) * (2 * layers * width + 1)

    def forward(
        self, sequence: Steps, state: State | None = None, reset: Reset | None = None
    ) -> tuple[Features, State]:
        batch, steps, _ = sequence.shape
        past = self.memory - 1
        if state is None:
            state = sequence.new_zeros(batch, self.state_features, dtype=self.embed.weight.dtype)
        there, cache = state[:, :past] > 0.5, state[:, past:].view(batch, len(self.blocks), past, 2 * self.width)
        # Positions of one number belong to one trial; what the state keeps is of trial 0, or of none.
        trial = there.new_zeros(batch, steps, dtype=torch.long) if reset is None else reset.long().cumsum(1)
        trial = torch.cat([there.long() - 1, trial], 1)
        now = torch.arange(past, past + steps, device=sequence.device).unsqueeze(-1)
        then = torch.arange(past + steps, device=sequence.device)
        near = (then <= now) & (then > now - self.memory)
        mask = ((trial[:, past:, None] == trial[:, None, :]) & near).unsqueeze(1)
        x = self.embed(sequence)
        left = [trial[:, steps:] == trial[:, -1:]]
        for k, block in enumerate(self.blocks):
            x, seen = block(x, cache[:, k], mask)
            left.append(seen[:, steps:].flatten(1))
        return self.norm(x), torch.cat([part.to(state.dtype) for part in left], 1)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, cache: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Features after the block, and the keys and values `[B, past + T, 2 * width]` that it attended to."""
        width = x.shape[-1]
        query, own = self.qkv(self.before(x)).split([width, 2 * width], -1)
        seen = torch.cat([cache.to(own.dtype), own], 1)
        key, value = seen.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = _rotate(query.unflatten(-1, (self.heads, -1)).transpose(1, 2), seen.shape[1]), _rotate(key)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + cast(Tensor, self.out(attended.transpose(1, 2).flatten(-2)))
        return x + cast(Tensor, self.feed(self.between(x))), seen


def _rotate(x: Tensor, end: int | None = None) -> Tensor:
    """Rotary positions of `[..., T, features]`, whose last one is before `end` (T if None)."""
    steps, features = x.shape[-2:]
    end = steps if end is None else end
    rates = torch.exp(torch.arange(0, features, 2, device=x.device) * (-math.log(10_000.0) / features))
    angles = torch.arange(end - steps, end, device=x.device)[:, None] * rates
    pairs = torch.view_as_complex((x if x.dtype == torch.double else x.float()).unflatten(-1, (-1, 2)))
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
