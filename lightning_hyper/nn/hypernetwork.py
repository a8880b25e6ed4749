"""A linear layer whose weights are a function of a context."""

from __future__ import annotations

from typing import Literal, cast

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hyper.checks import checked

Contraction = Literal["auto", "materialise", "outer", "inner"]


class GeneratedLinear(nn.Module):
    """y = W(z) x + b(z), or (W(z) x)(1 + s(z)) + b(z) with a gain; W, b and s are linear functions (heads) of z.

    One map, computed in the cheapest of three orders. Per row they do the same multiplications and differ in what lies
    in between, which is what takes the time: `materialise` makes W, in * out numbers; `outer` takes the head to the
    outer product of z and x, z * in numbers; `inner` applies the head to x first, z * out numbers, and then sums over
    z. `auto` takes the smallest. Where several x share one z, W is made once for all of them.

    Args:
        z_features: features of z.
        in_features: features of x.
        out_features: features of y.
        gain: generate a gain, which multiplies before the bias is added (Sarafian et al. 2021, Eq. 1).
        contraction: order of the computation.

    Raises:
        RecipeError: an unknown order.

    Source: the linear heads of arXiv 2309.14970 and 2106.06842; the orders are ours.
    """

    @checked
    def __init__(
        self,
        z_features: int,
        in_features: int,
        out_features: int,
        *,
        gain: bool = False,
        contraction: Contraction = "auto",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Linear(z_features, out_features * in_features)
        self.bias = nn.Linear(z_features, out_features)
        self.gain = nn.Linear(z_features, out_features) if gain else None
        between = {
            "outer": z_features * in_features,
            "inner": z_features * out_features,
            "materialise": in_features * out_features,
        }
        self.contraction = min(between, key=lambda name: between[name]) if contraction == "auto" else contraction

    def generate(
        self, z: Float[Tensor, "*C z"]
    ) -> tuple[
        Float[Tensor, "*C {self.out_features} {self.in_features}"],
        Float[Tensor, "*C {self.out_features}"],
        Float[Tensor, "*C {self.out_features}"] | None,
    ]:
        """Weight `[*C, out, in]`, bias `[*C, out]` and gain `[*C, out]` (None without one) for z `[*C, z]`."""
        weight = self.weight(z).unflatten(-1, (self.out_features, self.in_features))
        return weight, self.bias(z), None if self.gain is None else self.gain(z)

    def forward(
        self, z: Float[Tensor, "*C z"], x: Float[Tensor, "*batch {self.in_features}"]
    ) -> Float[Tensor, "*batch {self.out_features}"]:
        """y `[*C, *N, out]` for z `[*C, z]` and x `[*C, *N, in]`; weights are made once for each z."""
        shared = x.ndim - z.ndim
        y = self._shared(z, x) if shared else self._per_row(z, x)
        bias = self.bias(z)
        if self.gain is not None:
            y = y * (1 + _spread(self.gain(z), shared))
        return y + _spread(bias, shared)

    def _shared(self, z: Tensor, x: Tensor) -> Tensor:
        weight = self.weight(z).unflatten(-1, (self.out_features, self.in_features))
        between = x.shape[z.ndim - 1 : -1]
        y = x.flatten(z.ndim - 1, -2) @ weight.transpose(-1, -2)
        return cast(Tensor, y.unflatten(-2, between))

    def _per_row(self, z: Tensor, x: Tensor) -> Tensor:
        head = self.weight
        if self.contraction == "materialise":
            return _times(head(z).unflatten(-1, (self.out_features, self.in_features)), x)
        always = F.linear(x, head.bias.view(self.out_features, self.in_features))
        if self.contraction == "outer":
            outer = (x.unsqueeze(-1) * z.unsqueeze(-2)).flatten(-2)
            return always + F.linear(outer, head.weight.view(self.out_features, -1))
        by_input = head.weight.view(self.out_features, self.in_features, -1).transpose(1, 2).flatten(0, 1)
        inner = F.linear(x, by_input).unflatten(-1, (self.out_features, -1))
        return always + _times(inner, z)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Each row's matrix `[*C, a, b]` times its vector `[*C, b]`."""
    if vector.device.type == "cpu":
        # The gradient of a matrix is then an outer product, which many small products of matrices make twice as slowly.
        return (matrix * vector.unsqueeze(-2)).sum(-1)
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _spread(value: Tensor, shared: int) -> Tensor:
    """`[*C, out]` made to go with `[*C, *N, out]`, N having `shared` dimensions."""
    return value[(..., *(None,) * shared, slice(None))]
