"""Shapes that annotations tell are checked in tests; PyTorch itself would take all of these wrong ones."""

import pytest
import torch
from jaxtyping import TypeCheckError
from torch.distributions import Categorical

from lightning_hyper.nn import (
    GRU,
    LSTM,
    MLP,
    ContextOnly,
    ConvEncoder,
    GeneratedLinear,
    GridEncoder,
    MLPTrunk,
    ResidualTrunk,
    Transformer,
    VectorEncoder,
    grouped,
)
from lightning_hyper.nn.init import base_scheme, default
from lightning_hyper.objectives import DynamicAlpha, FixedAlpha, PPOLoss


def loss(advantage):
    rows = torch.zeros(4)
    policy = Categorical(logits=torch.zeros(4, 3))
    return PPOLoss()(policy, rows, action=rows, log_prob=rows, old_value=rows, advantage=advantage, target=rows)


WRONG = {
    "input of other features": lambda: ContextOnly(3, 5, 2)(torch.ones(7, 4), torch.ones(7, 5)),
    "input of other features beside z": lambda: ContextOnly(3, 5, 2).conditioned(torch.ones(7, 4), torch.ones(7, 5)),
    "index that is no int64": lambda: grouped(
        MLP(3, 5, 2), torch.ones(7, 3), torch.ones(2, 5), torch.zeros(7, dtype=torch.int32)
    ),
    "z for one row": lambda: GeneratedLinear(5, 3, 2)(torch.ones(7, 5), torch.ones(1, 3)),
    "vector of other features": lambda: VectorEncoder(3, widths=())(torch.ones(2, 4)),
    "grid with codes first": lambda: GridEncoder((7, 7, 3))(torch.ones(2, 3, 7, 7)),
    "image with channels first": lambda: ConvEncoder((36, 36, 3))(torch.ones(2, 3, 36, 36)),
    "bias of inputs": lambda: default(torch.empty(4, 3), torch.empty(3), 1.0),
    "bias of inputs, by name": lambda: base_scheme("normc")(torch.empty(4, 3), torch.empty(3), 1.0),
    "context trunk of other features": lambda: MLPTrunk(3, widths=())(torch.ones(2, 4)),
    "residual trunk of other features": lambda: ResidualTrunk(3, widths=())(torch.ones(2, 4)),
    "resets of one row": lambda: GRU(3)(torch.ones(2, 4, 3), None, torch.zeros(1, 4, dtype=torch.bool)),
    "resets of one step": lambda: LSTM(3)(torch.ones(2, 4, 3), None, torch.zeros(2, 1, dtype=torch.bool)),
    "resets that are numbers": lambda: Transformer(3)(torch.ones(2, 4, 3), None, torch.zeros(2, 4)),
    "advantages in a column": lambda: loss(torch.zeros(4, 1)),
    "fixed alpha of a column": lambda: FixedAlpha()(torch.ones(4, 1), 0.5),
    "dynamic alpha of a column": lambda: DynamicAlpha()(torch.ones(4, 1), 0.5),
}


@torch.no_grad()
@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_a_wrong_shape_is_refused(call):
    with pytest.raises(TypeCheckError):
        call()
