"""Alpha and the value loss that it weighs, against a calculation by hand."""

import pytest
import torch
from torch.distributions import Categorical

from lightning_hyper.checks import RecipeError
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
    loss = PPOLoss(clip=0.2, clip_value=True)
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


def test_without_a_clip_of_values_the_loss_is_the_papers():
    value, target = torch.tensor([0.5, -1.0]), torch.tensor([1.0, 0.0])
    recalled, alpha = torch.tensor([0.1, 3.0]), torch.tensor([0.25, 1.0])
    rest = {"action": torch.zeros(2, dtype=torch.int64), "log_prob": torch.zeros(2), "advantage": torch.zeros(2)}
    out = PPOLoss()(
        Categorical(logits=torch.zeros(2, 2)), value, **rest, old_value=torch.zeros(2), target=target,
        remembered=(recalled, alpha),
    )  # fmt: skip
    assert out["value"].item() == pytest.approx(0.5 * ((0.75 * 0.25 + 0.25 * 0.16) + 16.0) / 2)


def test_alpha_zero_is_the_loss_without_a_memory():
    data = {key: torch.randn(5) for key in ("old_value", "advantage", "target")}
    data |= {"action": torch.zeros(5, dtype=torch.int64), "log_prob": torch.zeros(5)}
    policy, value = Categorical(logits=torch.randn(5, 2)), torch.randn(5)
    for options in ({}, {"clip_value": True, "value_loss": "huber"}):
        loss = PPOLoss(**options)
        with_memory = loss(policy, value, **data, remembered=(torch.randn(5), torch.zeros(5)))
        for key, expected in loss(policy, value, **data).items():
            torch.testing.assert_close(with_memory[key], expected)


@pytest.mark.parametrize(
    "make", [lambda: DynamicAlpha(floor=1.5), lambda: FixedAlpha(value=-0.1), lambda: DecayingAlpha(begin=2.0)]
)
def test_a_share_out_of_range_is_named(make):
    with pytest.raises(RecipeError, match=r"Alpha.(floor|value|begin) is .* must be a number from 0 to 1"):
        make()


def test_a_power_that_does_not_decay_is_named():
    with pytest.raises(RecipeError, match=r"DecayingAlpha.power is 0"):
        DecayingAlpha(power=0.0)
