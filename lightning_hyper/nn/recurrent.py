"""Recurrent encoders: GRU and LSTM with memory that begins afresh anywhere in a window."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import PackedSequence

from lightning_hyper.checks import Layers, Width, checked
from lightning_hyper.nn.sequence import Features, Reset, SequenceEncoder, State, Steps


class _Recurrent(SequenceEncoder):
    """PyTorch's recurrent layers; orthogonal weights, zero bias. Under autocast they keep their own precision."""

    kind: type[nn.GRU] | type[nn.LSTM]
    parts: int  # tensors in the layer's own state

    @checked
    def __init__(self, in_features: int, *, hidden: Width = 64, layers: Layers = 1) -> None:
        super().__init__()
        self.rnn = self.kind(in_features, hidden, layers)
        for name, parameter in self.rnn.named_parameters():
            if "weight" in name:
                nn.init.orthogonal_(parameter)
            else:
                nn.init.zeros_(parameter)
        self.out_features = hidden
        self.state_features = self.parts * layers * hidden

    def forward(
        self, sequence: Steps, state: State | None = None, reset: Reset | None = None
    ) -> tuple[Features, State]:
        dtype = next(self.rnn.parameters()).dtype
        if state is None:
            state = sequence.new_zeros(len(sequence), self.state_features, dtype=dtype)
        with torch.autocast(sequence.device.type, enabled=False):
            run = self._on_cpu if sequence.device.type == "cpu" else self._packed
            features, after = run(sequence.to(dtype), state.to(dtype), reset)
        return features, after.to(state.dtype)

    def _on_cpu(self, sequence: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        # PyTorch takes a window step by step here, so that one cut wherever any row's state is made fresh costs little,
        # and less than packing does.
        cuts = [0, sequence.shape[1]]
        if reset is not None:
            cuts = sorted({*cuts, *reset.any(0).nonzero().flatten().tolist()})
        features = []
        for start, end in pairwise(cuts):
            state = state if reset is None else state * ~reset[:, start : start + 1]
            y, after = self.rnn(sequence[:, start:end].transpose(0, 1), self._split(state))
            features.append(y)
            state = self._join(after)
        return torch.cat(features).transpose(0, 1), state

    def _packed(self, sequence: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        # Each row is cut at its own resets, and the segments of all rows run side by side, packed as PyTorch packs
        # sequences of unequal length: by time, and of one time those of longer segments first.
        if reset is None:
            reset = sequence.new_zeros(sequence.shape[:2], dtype=torch.bool)
        state = state * ~reset[:, :1]
        begins = reset.clone()
        begins[:, 0] = True
        segment = begins.flatten().cumsum(0) - 1
        first = begins.flatten().nonzero().squeeze(-1)
        steps = torch.arange(len(segment), device=segment.device)
        time = steps - first[segment]
        by_length = torch.bincount(segment).argsort(descending=True, stable=True)
        rank = torch.empty_like(by_length)
        rank[by_length] = torch.arange(len(rank), device=rank.device)
        order = (time * len(rank) + rank[segment]).argsort()
        place = torch.empty_like(order)
        place[order] = steps
        packed = PackedSequence(sequence.flatten(0, 1)[order], torch.bincount(time).cpu())
        ends = rank[segment.view_as(reset)]
        start = state.new_zeros(len(rank), state.shape[-1]).index_copy(0, ends[:, 0], state)
        features, after = self.rnn(packed, self._split(start))
        return features.data[place].view(*reset.shape, -1), self._join(after)[ends[:, -1]]

    def _split(self, state: Tensor) -> Any:
        """State `[B, parts * layers * hidden]` as PyTorch's layers have it, `[layers, B, hidden]` of each part."""
        split = state.unflatten(-1, (self.parts, self.rnn.num_layers, -1)).permute(1, 2, 0, 3).contiguous()
        return split[0] if self.parts == 1 else tuple(split)

    def _join(self, after: Any) -> Tensor:
        stacked = torch.stack([after] if self.parts == 1 else list(after))
        return stacked.permute(2, 0, 1, 3).flatten(1)


class GRU(_Recurrent):
    """Gated recurrent unit (Cho et al. 2014).

    Args:
        in_features: features of each step.
        hidden: width.
        layers: layers on top of each other.

    Raises:
        RecipeError: a size that is not positive.
    """

    kind, parts = nn.GRU, 1

    def _on_cpu(self, sequence: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        keep = None if reset is None else (~reset).t().unsqueeze(-1).to(state.dtype)
        x, after = sequence.transpose(0, 1), []
        for weights, h in zip(self.rnn.all_weights, state.chunk(self.rnn.num_layers, -1), strict=True):
            if len(x) == 1:
                x = torch.gru_cell(x[0], h if keep is None else h * keep[0], *weights).unsqueeze(0)
            else:
                x = _GRUWindow.apply(x, h, keep, *weights)
            after.append(x[-1])
        return x.transpose(0, 1), torch.cat(after, -1)


class LSTM(_Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber 1997).

    Args:
        in_features: features of each step.
        hidden: width.
        layers: layers on top of each other.

    Raises:
        RecipeError: a size that is not positive.
    """

    kind, parts = nn.LSTM, 2


class _GRUWindow(torch.autograd.Function):
    """A GRU layer over `[T, B, in]` from h `[B, hidden]`, its gradient by hand: features `[T, B, hidden]`.

    PyTorch's backward works step by step; here all that does not depend on the step after is done once for the window.
    `keep` `[T, B, 1]` is 0 where the state is made fresh before a step, and 1 elsewhere.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, keep: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
    ) -> Tensor:
        steps, batch, n = len(x), len(h), h.shape[-1]
        b_rz, b_c = b_hh.split([2 * n, n])
        w_rz, w_c = w_hh.t().split([2 * n, n], -1)
        gates = torch.addmm(b_ih, x.reshape(steps * batch, -1), w_ih.t()).view(steps, batch, 3 * n)
        gates[..., : 2 * n] += b_rz
        c_of_h = x.new_empty(steps, batch, n)
        states = x.new_empty(steps + 1, batch, n)
        states[0] = h
        fresh = [False] * steps if keep is None else (keep == 0).any(1).flatten().tolist()
        r_z_c = gates.split(n, -1)
        by_time = zip(*(part.unbind(0) for part in (gates[..., : 2 * n], *r_z_c, c_of_h, states)), strict=False)
        for t, (rz, r, z, c, of_h, start) in enumerate(by_time):
            if fresh[t]:
                start = start * keep[t]  # type: ignore[index]
            torch.addmm(rz, start, w_rz, out=rz).sigmoid_()
            torch.addmm(b_c, start, w_c, out=of_h)
            c.addcmul_(r, of_h).tanh_()
            torch.lerp(c, start, z, out=states[t + 1])
        ctx.save_for_backward(x, states, gates, c_of_h, w_ih, w_hh, keep)
        ctx.fresh = fresh
        return states[1:]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, states, gates, c_of_h, w_ih, w_hh, keep = ctx.saved_tensors
        steps, batch, n = grad.shape
        r, z, c = gates.split(n, -1)
        before = states[:-1] if keep is None else states[:-1] * keep
        # By what the gradient of a step's state is multiplied on its way to r, z and what c takes from h.
        to_c = (1 - z).mul_(1 - c * c)
        factor = x.new_empty(steps, batch, 3, n)
        torch.mul(to_c * r, c_of_h * (1 - r), out=factor[:, :, 0])
        torch.mul((before - c).mul_(z), 1 - z, out=factor[:, :, 1])
        torch.mul(to_c, r, out=factor[:, :, 2])
        of_state = x.new_empty(steps, batch, n)
        of_gates = x.new_empty(steps, batch, 3, n)
        flat = of_gates.view(steps, batch, 3 * n)
        carry = torch.zeros_like(grad[0])
        for t in range(steps - 1, -1, -1):
            d = torch.add(grad[t], carry, out=of_state[t])
            torch.mul(d.unsqueeze(1), factor[t], out=of_gates[t])
            carry = torch.addmm(d * z[t], flat[t], w_hh)
            if ctx.fresh[t]:
                carry = carry * keep[t]
        rows = flat.view(steps * batch, 3 * n)
        of_w_hh, of_b_hh = rows.t() @ before.reshape(steps * batch, n), rows.sum(0)
        torch.mul(of_state, to_c, out=of_gates[:, :, 2])
        of_w_ih, of_b_ih = rows.t() @ x.reshape(steps * batch, -1), rows.sum(0)
        of_x = (rows @ w_ih).view_as(x) if ctx.needs_input_grad[0] else None
        return of_x, carry, None, of_w_ih, of_w_hh, of_b_ih, of_b_hh
