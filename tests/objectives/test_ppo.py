"""The clipped surrogate equals TorchRL's, and a formula in plain numbers."""

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch.distributions import Categorical
from torchrl.objectives import ClipPPOLoss

from lightning_hyper.objectives import PPOLoss


def batch(n=64, actions=5):
    logits = torch.randn(n, actions)
    old = Categorical(logits=logits + 0.3 * torch.randn(n, actions))
    action = old.sample()
    return {
        "logits": logits,
        "value": torch.randn(n),
        "action": action,
        "log_prob": old.log_prob(action),
        "old_value": torch.randn(n),
        "advantage": torch.randn(n),
        "target": 2 * torch.randn(n),
    }


def losses(loss, data):
    data = dict(data)
    return loss(Categorical(logits=data.pop("logits")), data.pop("value"), **data)


def test_policy_and_entropy_terms_equal_torchrls():
    data = batch()
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(torch.nn.Identity(), ["features"], ["logits"]),
        ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=Categorical, return_log_prob=True),
    )
    critic = TensorDictModule(torch.nn.Identity(), ["value_features"], ["state_value"])
    theirs = ClipPPOLoss(actor, critic, clip_epsilon=0.2, entropy_coeff=0.01, loss_critic_type="l2", clip_value=False)
    theirs.set_keys(sample_log_prob="action_log_prob")
    out = theirs(
        TensorDict(
            {
                "features": data["logits"],
                "value_features": data["value"][:, None],
                "action": data["action"],
                "action_log_prob": data["log_prob"],
                "advantage": data["advantage"][:, None],
                "value_target": data["target"][:, None],
            },
            batch_size=[64],
        )
    )
    ours = losses(PPOLoss(clip=0.2, entropy=0.01, value_loss="mse", clip_value=False), data)
    torch.testing.assert_close(ours["policy"], out["loss_objective"])
    torch.testing.assert_close(-0.01 * ours["entropy"], out["loss_entropy"])
    torch.testing.assert_close(ours["value"], 0.5 * (data["value"] - data["target"]).square().mean())


def test_value_term_is_the_larger_huber_loss_of_clipped_and_unclipped():
    data = batch(1)
    data.update(
        value=torch.tensor([3.0]), old_value=torch.tensor([0.0]), target=torch.tensor([2.5]), advantage=torch.zeros(1)
    )
    out = losses(PPOLoss(clip=0.2, value=0.5, entropy=0.0), data)
    unclipped, clipped = 0.5 * 0.5 * 0.5**2, 0.5 * (2.3 - 0.5)
    assert out["value"].item() == pytest.approx(max(unclipped, clipped))
    assert out["total"].item() == pytest.approx(0.5 * clipped)


def test_fresh_data_has_ratio_one():
    data = batch()
    data["log_prob"] = Categorical(logits=data["logits"]).log_prob(data["action"])
    out = losses(PPOLoss(clip=0.2), data)
    assert out["clipped"].item() == 0
    assert out["kl"].abs().item() < 1e-7
    assert out["policy"].item() == pytest.approx(-data["advantage"].mean().item(), abs=1e-6)


def test_no_gradient_where_a_good_action_is_already_likely_enough():
    logits = torch.zeros(1, 2, requires_grad=True)
    fixed = {"action": torch.tensor([0]), "log_prob": torch.tensor([math.log(0.3)])}
    rest = {"old_value": torch.zeros(1), "target": torch.zeros(1), "advantage": torch.ones(1)}
    out = PPOLoss(clip=0.2, entropy=0.0, value=0.0)(Categorical(logits=logits), torch.zeros(1), **fixed, **rest)
    out["total"].backward()
    assert logits.grad.abs().max().item() == 0


@pytest.mark.parametrize(("options", "key"), [({"clip": 0.0}, "loss.clip"), ({"value_loss": "l1"}, "loss.value_loss")])
def test_bad_options_name_the_key(options, key):
    with pytest.raises(ValueError, match=key):
        PPOLoss(**options)
