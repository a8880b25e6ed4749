"""Alpha and the value loss that it weighs, against a calculation by hand."""

import pytest
import torch
from torch.distributions import Categorical

from lightning_hyper.objectives import DecayingAlpha, DynamicAlpha, FixedAlpha, PPOLoss


def test_alpha_rules():
    confidence = torch.tensor([0.05, 0.1, 0.7])
    assert DynamicAlpha()(confidence, 0.3).tolist() == pytest.approx([0.1, 0.1, 0.7])
    assert DynamicAlpha(floor=0.5)(confidence, 0.3).tolist() == pytest.approx([0.5, 0.5, 0.7])
    assert FixedAlpha(value=0.2)(confidence, 0.3).tolist() == pytest.approx([0.2] * 3)
    assert DecayingAlpha()(confidence, 0.3).tolist() == pytest.approx([0.49] * 3)
    assert DecayingAlpha(begin=0.5, power=1)(confidence, 1.0).tolist() == [0.0] * 3


def test_dynamic_alpha_has_a_gradient_only_above_its_floor():
    confidence = torch.tensor([0.05, 0.7], requires_grad=True)
    DynamicAlpha()(confidence, 0.0).sum().backward()
    assert confidence.grad.tolist() == [0.0, 1.0]


def test_value_loss_and_its_gradients_equal_the_formula():
    loss = PPOLoss(clip=0.2, entropy=0.0, value=1.0, value_loss="mse")
    value = torch.tensor([0.5, 0.9, -0.2], requires_grad=True)
    recalled = torch.tensor([0.1, 0.8, 0.4], requires_grad=True)
    alpha = torch.tensor([0.1, 0.6, 0.3], requires_grad=True)
    old, target = torch.tensor([0.6, 0.2, -0.1]), torch.tensor([1.0, 0.0, 0.5])
    losses = loss(
        Categorical(logits=torch.zeros(3, 2)),
        value,
        action=torch.zeros(3, dtype=torch.int64),
        log_prob=torch.full((3,), -0.6931472),
        old_value=old,
        advantage=torch.zeros(3),
        target=target,
        remembered=(recalled, alpha),
    )
    total, grads = 0.0, {"value": [], "recalled": [], "alpha": []}
    for v, m, a, v0, r in zip(*(x.tolist() for x in (value, recalled, alpha, old, target)), strict=True):
        mixed = (1 - a) * (v - r) ** 2 + a * (v - m) ** 2
        near = min(max(v, v0 - 0.2), v0 + 0.2)
        total += 0.5 * max(mixed, (near - r) ** 2) / 3
        if mixed >= (near - r) ** 2:
            grads["value"].append(((1 - a) * (v - r) + a * (v - m)) / 3)
            grads["recalled"].append(-a * (v - m) / 3)
            grads["alpha"].append(0.5 * ((v - m) ** 2 - (v - r) ** 2) / 3)
        else:
            grads["value"].append((near - r) / 3 if near == v else 0.0)
            grads["recalled"].append(0.0)
            grads["alpha"].append(0.0)
    assert losses["value"].item() == pytest.approx(total, rel=1e-6)
    losses["total"].backward()
    for name, tensor in (("value", value), ("recalled", recalled), ("alpha", alpha)):
        assert tensor.grad.tolist() == pytest.approx(grads[name], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("make", [lambda: DynamicAlpha(floor=1.5), lambda: FixedAlpha(value=-0.1)])
def test_a_share_out_of_range_is_named(make):
    with pytest.raises(ValueError, match=r"model.alpha.(floor|value) is .* must lie in \[0, 1\]"):
        make()
