"""Q-functions as conditional networks: which of state and action is the input, and which the context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_hyper.modules.agent import ConditionalFactory
from lightning_hyper.modules.spaces import Spaces

Order = Literal["SA", "AS", "constant"]
CONSTANT_FEATURES = 5


class TwinCritic(nn.Module):
    """Two Q-functions of the same make.

    Args:
        spaces: sizes of the environment.
        network: makes a conditional network of (inputs, context, 1).
        order: `SA` conditions a network of the action on the state, `AS` one of the state on the action; `constant`
            conditions one of both on 5 learned numbers, the same everywhere.
        shared_trunk: one trunk for the two, instead of one each as in the paper.

    Raises:
        ValueError: an unknown order; a trunk to be shared where there is none.

    Source: arXiv 2106.06842 (Sarafian et al. 2021), sections 3 and 4.
    """

    def __init__(
        self, spaces: Spaces, network: ConditionalFactory, *, order: Order = "SA", shared_trunk: bool = False
    ) -> None:
        super().__init__()
        if order not in get_args(Order):
            raise ValueError(f"model.order is {order!r}; choose one of {', '.join(get_args(Order))}")
        self.order = order
        state, action = spaces.observation, spaces.actions
        inputs, context = {
            "SA": (action, state),
            "AS": (state, action),
            "constant": (state + action, CONSTANT_FEATURES),
        }[order]
        self.first, self.second = network(inputs, context, 1), network(inputs, context, 1)
        self.shared_trunk = shared_trunk
        if shared_trunk:
            try:
                self.second.share_trunk(self.first)
            except ValueError as error:
                raise ValueError(f"model.shared_trunk: {error}") from error
        if order == "constant":
            self.constants = nn.ParameterList([torch.rand(CONSTANT_FEATURES) for _ in range(2)])

    def forward(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Values `[*B]` of both for states `[*B, state]` and actions `[*B, action]` scaled to [-1, 1]."""
        x, contexts = self._parts(state, action)
        if self.shared_trunk and self.first.trunk is not None and self.order != "constant":
            z = self.first.trunk(contexts[0])
            values = self.first.conditioned(x, z), self.second.conditioned(x, z)
        else:
            values = self.first(x, contexts[0]), self.second(x, contexts[1])
        return values[0].squeeze(-1).float(), values[1].squeeze(-1).float()

    def value(self, state: Tensor, action: Tensor) -> Tensor:
        """Values `[*B]` of the first alone."""
        x, contexts = self._parts(state, action)
        value: Tensor = self.first(x, contexts[0])
        return value.squeeze(-1).float()

    def _parts(self, state: Tensor, action: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if self.order == "SA":
            return action, (state, state)
        if self.order == "AS":
            return state, (action, action)
        return torch.cat([state, action], -1), (self.constants[0], self.constants[1])


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let gradients through a module, but not to its parameters.

    What depends on none of the inputs that are differentiated then keeps no graph: in SA order a policy step runs the
    trunk, which sees the state alone, without gradients.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
