"""Conditional networks f(x | c): a network of an input x, and how a context c enters it.

All share one constructor, `(in_features, context_features, out_features, *, ...)`, and one call,
`forward(x [*C, *N, in], context [*C, context]) -> [*C, *N, out]`: the context may have fewer leading dimensions than
the input, and what it gives rise to is then computed once per context, never once per input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from lightning_hyper.checks import Positive, RecipeError, Width, at, checked
from lightning_hyper.nn.activations import Activation
from lightning_hyper.nn.activations import activation as make_activation
from lightning_hyper.nn.hypernetwork import Contraction, GeneratedLinear
from lightning_hyper.nn.init import HYPERINIT, HyperScheme, Layer, Scheme, base_scheme, initialize, own_gain
from lightning_hyper.nn.trunks import Trunk, plain_linear

TrunkFactory = Callable[[int], Trunk]
Quirk = Literal["kaiming_critic_head", "critic_bias_fan_in"]
# *batch are *C and *N, of which an annotation can have one: `forward` checks by itself that x begins with *C. A network
# blind to the context takes any, such as one without features.
Input = Float[Tensor, "*batch {self.in_features}"]
Context = Float[Tensor, "*C context"]
Features = Float[Tensor, "*C z"]
Output = Float[Tensor, "*batch {self.out_features}"]


class Conditional(nn.Module, ABC):
    """A network f(x | c).

    A subclass makes its layers in `_build`, which the constructor calls last, and says in `conditioned` how they run.
    One with options of its own takes them in, with `**options` for the rest, before it calls this constructor.

    Args:
        in_features: features of x.
        context_features: features of c; 0 where there is no context.
        out_features: features of the output.
        hidden: width of each hidden layer.
        activation: name of the activation between layers.
        trunk: makes a body from the context to the features z that condition the network; null uses the context.
        hidden_init: base scheme of the hidden layers (see `nn.init`).
        hidden_gain: gain of the hidden layers; null for 1 with `default`, and otherwise for that of the activation
            (5/3 for tanh, sqrt(2) for ReLU).
        out_init: base scheme of the output layer.
        out_gain: gain of the output layer.

    Attributes:
        uses_context: whether the output depends on c.
        uses_input: whether the output depends on x.
        shares_work: whether there is work worth sharing among inputs of one context (see `grouped`).
        z_features: features of z, what `conditioned` gets.

    Raises:
        RecipeError: a width that is not positive, an unknown activation or scheme, no context where one is needed.
    """

    uses_context: bool = True
    uses_input: bool = True
    shares_work: bool = True
    needs_context: str = ""  # where a class makes no sense without a context: what it does with it

    @checked
    def __init__(
        self,
        in_features: int,
        context_features: int,
        out_features: int,
        *,
        hidden: Sequence[Width] = (64,),
        activation: Activation = "tanh",
        trunk: TrunkFactory | None = None,
        hidden_init: Scheme = "default",
        hidden_gain: Positive | None = None,
        out_init: Scheme = "default",
        out_gain: Positive = 1.0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if context_features == 0:
            if self.needs_context:
                raise RecipeError(
                    f"{name} {self.needs_context} a context, and there is none: name model.context, or, for "
                    "a critic of actions, model.critic_context"
                )
            self.uses_context = False
        self.in_features, self.context_features, self.out_features = in_features, context_features, out_features
        self.hidden, self.activation, self.activation_name = tuple(hidden), make_activation(activation), activation
        with at("trunk"):
            self.trunk = trunk(context_features) if trunk is not None and context_features else None
        self.z_features = self.trunk.out_features if self.trunk is not None else context_features
        self.hidden_init, self.hidden_gain = hidden_init, hidden_gain
        self.out_init, self.out_gain = out_init, out_gain
        self._build()
        if trunk is not None and not self.uses_context:
            raise RecipeError(f"trunk makes features of a context, and this {name} uses none: leave trunk out")
        self.shares_work = self.shares_work or self.trunk is not None

    @abstractmethod
    def _build(self) -> None:
        """Make the layers, once all sizes are known."""

    @abstractmethod
    def conditioned(self, x: Input, z: Features) -> Output:
        """The output `[*C, *N, out]` for x `[*C, *N, in]` and z `[*C, z]`."""

    def forward(self, x: Input, context: Context) -> Output:
        """The output `[*C, *N, out]` for x `[*C, *N, in]` and context `[*C, context]`."""
        lead = context.shape[:-1]
        if x.shape[: len(lead)] != lead or x.ndim <= len(lead):
            raise ValueError(
                f"context {tuple(context.shape)} does not go with x {tuple(x.shape)}: its leading dimensions must be "
                "the first of x's"
            )
        return self.conditioned(x, context if self.trunk is None else self.trunk(context))

    def share_trunk(self, other: Conditional) -> None:
        """Use the trunk of another network, which then learns for both.

        Raises:
            RecipeError: one of the two has no trunk.
        """
        if self.trunk is None or other.trunk is None:
            raise RecipeError(f"a trunk is to be shared, but {type(self).__name__} has none; name one, or do not share")
        self.trunk = other.trunk

    def _gain(self, scheme: str, *, is_output: bool) -> float:
        if is_output:
            return self.out_gain
        return own_gain(scheme, self.activation_name) if self.hidden_gain is None else self.hidden_gain

    def _plain_layer(self, in_features: int, out_features: int, *, is_output: bool) -> nn.Linear:
        scheme = self.out_init if is_output else self.hidden_init
        return plain_linear(in_features, out_features, scheme, self._gain(scheme, is_output=is_output))

    def _plain_layers(self, in_features: int) -> nn.ModuleList:
        sizes = [in_features, *self.hidden, self.out_features]
        return nn.ModuleList(
            self._plain_layer(a, b, is_output=k == len(self.hidden)) for k, (a, b) in enumerate(pairwise(sizes))
        )


class MLP(Conditional):
    """A plain network of x alone, blind to c."""

    uses_context = False
    shares_work = False

    def _build(self) -> None:
        self.layers = self._plain_layers(self.in_features)

    def conditioned(self, x: Input, z: Features) -> Output:
        return _run(self.layers, x, self.activation)


class ContextOnly(Conditional):
    """A plain network of c alone, blind to x: the baseline RNN of arXiv 2309.14970."""

    uses_input = False
    needs_context = "is a network of"

    def _build(self) -> None:
        self.layers = self._plain_layers(self.z_features)

    def conditioned(self, x: Input, z: Features) -> Output:
        y = _spread(_run(self.layers, z, self.activation), x)
        return y.expand(*x.shape[:-1], self.out_features)


class Concat(Conditional):
    """A plain network of x and c side by side."""

    shares_work = False

    def _build(self) -> None:
        self.layers = self._plain_layers(self.in_features + self.z_features)

    def conditioned(self, x: Input, z: Features) -> Output:
        return _run(self.layers, _beside(x, z), self.activation)


class D2RL(Conditional):
    """A plain network of x and c side by side, which every hidden layer sees again beside the layer before it.

    Source: Sinha et al. 2020 (D2RL), a control of arXiv 2106.06842.
    """

    shares_work = False

    def _build(self) -> None:
        inputs = self.in_features + self.z_features
        before = [0, *self.hidden[:-1]]
        self.layers = nn.ModuleList(
            self._plain_layer(inputs + width, out, is_output=False)
            for width, out in zip(before, self.hidden, strict=True)
        )
        self.layers.append(self._plain_layer([inputs, *self.hidden][-1], self.out_features, is_output=True))

    def conditioned(self, x: Input, z: Features) -> Output:
        inputs = y = _beside(x, z)
        for k, layer in enumerate(self.layers[:-1]):
            y = self.activation(layer(torch.cat([y, inputs], -1) if k else y))
        out: Tensor = self.layers[-1](y)
        return out


class FiLM(Conditional):
    """A plain network of x whose units are scaled and shifted by c.

    Before the activation, unit u = w x becomes (1 + scale(c)) u + shift(c), both linear in c. They begin as the plain
    network's: scale 0, shift its bias.

    Args:
        film_output: scale and shift the output layer too.

    Source: Perez et al. 2018; with the output layer, as in the code of arXiv 2309.14970.
    """

    needs_context = "scales and shifts its units by"

    @checked
    def __init__(
        self, in_features: int, context_features: int, out_features: int, *, film_output: bool = True, **options: Any
    ) -> None:
        self.film_output = film_output
        super().__init__(in_features, context_features, out_features, **options)

    def _build(self) -> None:
        self.layers = self._plain_layers(self.in_features)
        self.film = nn.ModuleList()
        for layer in self.layers if self.film_output else self.layers[:-1]:
            plain = cast(nn.Linear, layer)
            head = nn.Linear(self.z_features, 2 * plain.out_features)
            with torch.no_grad():
                head.weight.zero_()
                head.bias.copy_(torch.cat([torch.zeros_like(plain.bias), plain.bias]))
            plain.bias = None  # type: ignore[assignment]  # the shift is the bias
            self.film.append(head)
        self.uses_context = len(self.film) > 0

    def conditioned(self, x: Input, z: Features) -> Output:
        for k, layer in enumerate(self.layers):
            x = layer(x)
            if k < len(self.film):
                scale, shift = _spread(self.film[k](z), x).chunk(2, -1)
                x = x * (1 + scale) + shift
            if k < len(self.hidden):
                x = self.activation(x)
        return x


class Hyper(Conditional):
    """A network of x whose weights are generated from c by a hypernetwork.

    Args:
        init: hypernetwork scheme of the generated layers (see `nn.init`); the HyperInit ones begin from `hidden_init`
            and `out_init`, all but `sarafian` have the gains `hidden_gain` and `out_gain`.
        gain: generate a gain of each unit too, (W x)(1 + s) + b.
        generated: `all`, or for each layer, the output layer included, whether it is generated; others have weights
            of their own.
        contraction: how generated layers are computed (see `GeneratedLinear`).
        quirks: peculiarities of the published critic, for exact reproduction with a HyperInit scheme:
            `kaiming_critic_head` draws the base weight of the output layer from U(+-sqrt(6 / in)),
            `critic_bias_fan_in` begins its bias at U(-1, 1), the same for every context.

    Source: arXiv 2309.14970 (linear heads, Bias-HyperInit); arXiv 2106.06842 (residual trunk, gain).
    """

    needs_context = "generates weights from"

    @checked
    def __init__(
        self,
        in_features: int,
        context_features: int,
        out_features: int,
        *,
        init: HyperScheme = "bias_hyperinit",
        gain: bool = False,
        generated: Literal["all"] | Sequence[bool] = "all",
        contraction: Contraction = "auto",
        quirks: Sequence[Quirk] = (),
        **options: Any,
    ) -> None:
        self.init, self.gain, self.generated = init, gain, generated
        self.contraction, self.quirks = contraction, tuple(quirks)
        super().__init__(in_features, context_features, out_features, **options)

    def _build(self) -> None:
        count = len(self.hidden) + 1
        mask = [True] * count if self.generated == "all" else list(self.generated)
        if len(mask) != count or not all(isinstance(entry, bool) for entry in mask):
            raise RecipeError(
                f"generated is {self.generated!r}; it must be 'all' or {count} of true and false, one per layer"
            )
        if self.quirks and (self.init not in HYPERINIT or not mask[-1]):
            raise RecipeError(
                f"quirks are those of a generated output layer with init one of {', '.join(HYPERINIT)}; leave them out"
            )
        self.uses_context = any(mask)
        self.layers = nn.ModuleList()
        for k, (a, b) in enumerate(pairwise([self.in_features, *self.hidden, self.out_features])):
            is_output = k == count - 1
            if mask[k]:
                layer = GeneratedLinear(self.z_features, a, b, gain=self.gain, contraction=self.contraction)
                initialize(self.init, self._scheme_view(layer, is_output=is_output))
                self.layers.append(layer)
                if is_output and "critic_bias_fan_in" in self.quirks:
                    nn.init.zeros_(layer.bias.weight)
                    nn.init.uniform_(layer.bias.bias, -1, 1)
            else:
                self.layers.append(self._plain_layer(a, b, is_output=is_output))

    def generate(
        self, context: Context
    ) -> list[tuple[Float[Tensor, "*C _out _in"], Float[Tensor, "*C _out"], Float[Tensor, "*C _out"] | None]]:
        """Weight `[*C, out, in]`, bias `[*C, out]` and gain `[*C, out]` or None of each generated layer, in order."""
        z = context if self.trunk is None else self.trunk(context)
        return [layer.generate(z) for layer in self.layers if isinstance(layer, GeneratedLinear)]

    def conditioned(self, x: Input, z: Features) -> Output:
        for k, layer in enumerate(self.layers):
            x = layer(z, x) if isinstance(layer, GeneratedLinear) else layer(x)
            if k < len(self.hidden):
                x = self.activation(x)
        return x

    def _scheme_view(self, layer: GeneratedLinear, *, is_output: bool) -> Layer:
        scheme = self.out_init if is_output else self.hidden_init

        def base(weight: Tensor, bias: Tensor) -> None:
            base_scheme(scheme)(weight, bias, self._gain(scheme, is_output=is_output))
            if is_output and "kaiming_critic_head" in self.quirks:
                base_scheme("kaiming")(weight, torch.empty_like(bias), 2**0.5)

        return Layer(
            weight=layer.weight,
            bias=layer.bias,
            gain=layer.gain,
            in_features=layer.in_features,
            out_features=layer.out_features,
            is_output=is_output,
            base=base,
            scale=self._gain(self.init, is_output=is_output),
        )


def grouped(
    network: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "B in"],
    contexts: Float[Tensor, "K context"],
    index: Int64[Tensor, " B"],
) -> Float[Tensor, "B out"]:
    """f(x | c) `[B, out]` for rows that share few contexts, each of which is taken once where that saves work.

    Args:
        network: a conditional network, or `conditioned` of one.
        x: `[B, in]`.
        contexts: the distinct contexts `[K, context]`.
        index: which of them is that of each row, int64 `[B]`.
    """
    if not getattr(network, "shares_work", True):
        return network(x, contexts[index])
    counts = torch.bincount(index, minlength=len(contexts))
    first, width = counts.cumsum(0) - counts, int(counts.max())
    order = index.argsort(stable=True)
    of_sorted = index[order]
    slot = torch.arange(len(order), device=order.device) - first[of_sorted] + width * of_sorted
    # Slots that no row takes are filled with the first row, whose results there nobody picks.
    source = order.new_zeros(len(contexts) * width).index_copy_(0, slot, order)
    place = torch.empty_like(order).index_copy_(0, order, slot)
    rows = x.index_select(0, source).view(len(contexts), width, -1)
    return network(rows, contexts).flatten(0, 1).index_select(0, place)


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
