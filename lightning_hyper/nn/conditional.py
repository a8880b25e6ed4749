"""Conditional networks f(x | c): a network of an input x, and how a context c enters it.

All share one constructor, `(in_features, context_features, out_features, *, ...)`, and one call,
`forward(x [*C, *N, in], context [*C, context]) -> [*C, *N, out]`: the context may have fewer leading dimensions than
the input, and what it gives rise to is then computed once per context, never once per input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_hyper.nn.activations import activation as make_activation
from lightning_hyper.nn.hypernetwork import GeneratedLinear
from lightning_hyper.nn.init import Layer, base_scheme, initialize
from lightning_hyper.nn.trunks import Trunk, plain_linear

TrunkFactory = Callable[[int], Trunk]
QUIRKS = ("kaiming_critic_head", "critic_bias_fan_in")


class Conditional(nn.Module, ABC):
    """A network f(x | c).

    Args:
        in_features: features of x.
        context_features: features of c.
        out_features: features of the output.
        hidden: width of each hidden layer.
        activation: name of the activation between layers.
        trunk: makes a body from the context to the features z that condition the network; null uses the context.
        hidden_init: base scheme of the hidden layers (see `nn.init`).
        hidden_gain: gain of the hidden layers; null for that of the activation (5/3 for tanh, sqrt(2) for ReLU).
        out_init: base scheme of the output layer.
        out_gain: gain of the output layer.

    Raises:
        ValueError: a width that is not positive, an unknown activation or scheme.
    """

    def __init__(
        self,
        in_features: int,
        context_features: int,
        out_features: int,
        *,
        hidden: Sequence[int] = (64,),
        activation: str = "tanh",
        trunk: TrunkFactory | None = None,
        hidden_init: str = "normc",
        hidden_gain: float | None = None,
        out_init: str = "default",
        out_gain: float = 1.0,
    ) -> None:
        super().__init__()
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden is {list(hidden)}; every width must be positive")
        self.in_features, self.context_features, self.out_features = in_features, context_features, out_features
        self.hidden, self.activation = tuple(hidden), make_activation(activation)
        self.trunk = trunk(context_features) if trunk is not None else None
        self.z_features = self.trunk.out_features if self.trunk is not None else context_features
        self.hidden_init, self.out_init, self.out_gain = hidden_init, out_init, out_gain
        own_gain = 5 / 3 if activation == "tanh" else 2**0.5 if activation == "relu" else 1.0
        self.hidden_gain = own_gain if hidden_gain is None else hidden_gain
        base_scheme(hidden_init), base_scheme(out_init)

    @abstractmethod
    def conditioned(self, x: Tensor, z: Tensor) -> Tensor:
        """The output for x `[*C, *N, in]` and z `[*C, z]`."""

    def share_trunk(self, other: Conditional) -> None:
        """Use the trunk of another network, which then learns for both.

        Raises:
            ValueError: one of the two has no trunk.
        """
        if self.trunk is None or other.trunk is None:
            raise ValueError(f"a trunk is to be shared, but {type(self).__name__} has none; name one, or do not share")
        self.trunk = other.trunk

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        lead = context.shape[:-1]
        if x.shape[: len(lead)] != lead or x.ndim <= len(lead):
            raise ValueError(
                f"context {tuple(context.shape)} does not go with x {tuple(x.shape)}: its leading dimensions must be "
                "the first of x's"
            )
        return self.conditioned(x, context if self.trunk is None else self.trunk(context))

    def _plain_layer(self, in_features: int, out_features: int, *, is_output: bool) -> nn.Linear:
        if is_output:
            return plain_linear(in_features, out_features, self.out_init, self.out_gain)
        return plain_linear(in_features, out_features, self.hidden_init, self.hidden_gain)

    def _plain_layers(self, in_features: int) -> nn.ModuleList:
        sizes = [in_features, *self.hidden, self.out_features]
        return nn.ModuleList(
            self._plain_layer(a, b, is_output=k == len(self.hidden)) for k, (a, b) in enumerate(pairwise(sizes))
        )


class Concat(Conditional):
    """A plain network of x and c side by side."""

    def __init__(self, in_features: int, context_features: int, out_features: int, **options: object) -> None:
        super().__init__(in_features, context_features, out_features, **options)  # type: ignore[arg-type]
        self.layers = self._plain_layers(in_features + self.z_features)

    def conditioned(self, x: Tensor, z: Tensor) -> Tensor:
        return _run(self.layers, _beside(x, z), self.activation)


class D2RL(Conditional):
    """A plain network of x and c side by side, which every hidden layer sees again beside the layer before it.

    Source: Sinha et al. 2020 (D2RL), a control of arXiv 2106.06842.
    """

    def __init__(self, in_features: int, context_features: int, out_features: int, **options: object) -> None:
        super().__init__(in_features, context_features, out_features, **options)  # type: ignore[arg-type]
        inputs = in_features + self.z_features
        before = [0, *self.hidden[:-1]]
        self.layers = nn.ModuleList(
            self._plain_layer(inputs + width, out, is_output=False)
            for width, out in zip(before, self.hidden, strict=True)
        )
        self.layers.append(self._plain_layer([inputs, *self.hidden][-1], out_features, is_output=True))

    def conditioned(self, x: Tensor, z: Tensor) -> Tensor:
        inputs = y = _beside(x, z)
        for k, layer in enumerate(self.layers[:-1]):
            y = self.activation(layer(torch.cat([y, inputs], -1) if k else y))
        out: Tensor = self.layers[-1](y)
        return out


class ContextOnly(Conditional):
    """A plain network of c alone, blind to x: the baseline RNN of arXiv 2309.14970."""

    def __init__(self, in_features: int, context_features: int, out_features: int, **options: object) -> None:
        super().__init__(in_features, context_features, out_features, **options)  # type: ignore[arg-type]
        self.layers = self._plain_layers(self.z_features)

    def conditioned(self, x: Tensor, z: Tensor) -> Tensor:
        y = _spread(_run(self.layers, z, self.activation), x)
        return y.expand(*x.shape[:-1], self.out_features)


class InputOnly(Conditional):
    """A plain network of x alone, blind to c: what a conditional network is compared with."""

    def __init__(self, in_features: int, context_features: int, out_features: int, **options: object) -> None:
        super().__init__(in_features, context_features, out_features, **options)  # type: ignore[arg-type]
        self.layers = self._plain_layers(in_features)

    def conditioned(self, x: Tensor, z: Tensor) -> Tensor:
        return _run(self.layers, x, self.activation)


class FiLM(Conditional):
    """A plain network of x whose hidden units are scaled and shifted by c (Perez et al. 2018).

    Before the activation, unit u becomes (1 + scale(c)) u + shift(c); both begin at zero.
    """

    def __init__(self, in_features: int, context_features: int, out_features: int, **options: object) -> None:
        super().__init__(in_features, context_features, out_features, **options)  # type: ignore[arg-type]
        self.layers = self._plain_layers(in_features)
        self.film = nn.ModuleList(nn.Linear(self.z_features, 2 * width) for width in self.hidden)
        for parameter in self.film.parameters():
            nn.init.zeros_(parameter)

    def conditioned(self, x: Tensor, z: Tensor) -> Tensor:
        for layer, head in zip(self.layers, self.film, strict=False):
            scale, shift = _spread(head(z), x).chunk(2, -1)
            x = self.activation(layer(x) * (1 + scale) + shift)
        y: Tensor = self.layers[-1](x)
        return y


class Hyper(Conditional):
    """A network of x whose weights are generated from c by a hypernetwork.

    Args:
        init: hypernetwork scheme of the generated layers (see `nn.init`).
        gain: generate a gain of each unit too, (W x)(1 + s) + b.
        generated: `all`, or for each layer, the output layer included, whether it is generated; others have weights
            of their own.
        contraction: how generated layers are computed (see `GeneratedLinear`).
        quirks: peculiarities of the published code, for exact reproduction: `kaiming_critic_head` draws the base
            weight of the output layer from U(+-sqrt(6 / in)), `critic_bias_fan_in` its base bias from U(-1, 1).

    Source: arXiv 2309.14970 (linear heads, Bias-HyperInit); arXiv 2106.06842 (residual trunk, gain).
    """

    def __init__(
        self,
        in_features: int,
        context_features: int,
        out_features: int,
        *,
        init: str = "bias_hyperinit",
        gain: bool = False,
        generated: str | Sequence[bool] = "all",
        contraction: str = "auto",
        quirks: Sequence[str] = (),
        **options: object,
    ) -> None:
        super().__init__(in_features, context_features, out_features, **options)  # type: ignore[arg-type]
        count = len(self.hidden) + 1
        mask = [True] * count if generated == "all" else list(generated)
        if len(mask) != count or not all(isinstance(entry, bool) for entry in mask):
            raise ValueError(
                f"generated is {generated!r}; it must be 'all' or {count} of true and false, one per layer"
            )
        unknown = set(quirks) - set(QUIRKS)
        if unknown:
            raise ValueError(f"quirks has {sorted(unknown)}; it may have {', '.join(QUIRKS)}")
        self.quirks = tuple(quirks)
        self.layers = nn.ModuleList()
        for k, (a, b) in enumerate(pairwise([in_features, *self.hidden, out_features])):
            if mask[k]:
                layer = GeneratedLinear(self.z_features, a, b, gain=gain, contraction=contraction)  # type: ignore[arg-type]
                initialize(init, self._scheme_view(layer, is_output=k == count - 1))
                self.layers.append(layer)
            else:
                self.layers.append(self._plain_layer(a, b, is_output=k == count - 1))

    def generate(self, context: Tensor) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Weight `[*C, out, in]`, bias `[*C, out]` and gain `[*C, out]` or None of each generated layer, in order."""
        z = context if self.trunk is None else self.trunk(context)
        return [layer.generate(z) for layer in self.layers if isinstance(layer, GeneratedLinear)]

    def conditioned(self, x: Tensor, z: Tensor) -> Tensor:
        for k, layer in enumerate(self.layers):
            x = layer(z, x) if isinstance(layer, GeneratedLinear) else layer(x)
            if k < len(self.hidden):
                x = self.activation(x)
        return x

    def _scheme_view(self, layer: GeneratedLinear, *, is_output: bool) -> Layer:
        def base(weight: Tensor, bias: Tensor) -> None:
            name, gain = (self.out_init, self.out_gain) if is_output else (self.hidden_init, self.hidden_gain)
            base_scheme(name)(weight, bias, gain)
            if is_output and "kaiming_critic_head" in self.quirks:
                base_scheme("kaiming")(weight, torch.empty_like(bias), 1.0)
            if is_output and "critic_bias_fan_in" in self.quirks:
                bias.uniform_(-1, 1)

        rectified = isinstance(self.activation, nn.ReLU | nn.ELU | nn.GELU)
        return Layer(
            weight=layer.weight,
            bias=layer.bias,
            gain=layer.gain,
            in_features=layer.in_features,
            out_features=layer.out_features,
            is_output=is_output,
            base=base,
            activation_factor=2.0 if rectified and not is_output else 1.0,
        )


def _run(layers: nn.ModuleList, x: Tensor, activation: nn.Module) -> Tensor:
    for layer in layers[:-1]:
        x = activation(layer(x))
    y: Tensor = layers[-1](x)
    return y


def _beside(x: Tensor, z: Tensor) -> Tensor:
    z = _spread(z, x)
    return torch.cat([x, z.expand(*x.shape[:-1], z.shape[-1])], -1)


def _spread(z: Tensor, x: Tensor) -> Tensor:
    """`[*C, features]` made to go with `[*C, *N, in]`."""
    return z[(..., *(None,) * (x.ndim - z.ndim), slice(None))]
