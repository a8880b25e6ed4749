"""The clipped surrogate equals TorchRL's, and a formula in plain numbers."""

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch.distributions import Categorical, Independent, Normal
from torchrl.objectives import ClipPPOLoss

from lightning_hyper.checks import RecipeError
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


def value_losses(now, old, target, **options):
    data = batch(1)
    data.update(
        value=torch.tensor([now]), old_value=torch.tensor([old]), target=torch.tensor([target]),
        advantage=torch.zeros(1),
    )  # fmt: skip
    return {key: loss.item() for key, loss in losses(PPOLoss(**options), data).items()}


def test_value_term_is_the_larger_huber_loss_of_clipped_and_unclipped():
    out = value_losses(3.0, 0.0, 2.5, clip=0.2, value=0.5, value_loss="huber", clip_value=True)
    unclipped, clipped = 0.5 * 0.5 * 0.5**2, 0.5 * (2.3 - 0.5)
    assert out["value"] == pytest.approx(max(unclipped, clipped))
    assert out["total"] == pytest.approx(0.5 * clipped)
    out = value_losses(0.1, 0.0, 2.5, clip=0.2, value_loss="huber", clip_value=True)  # moved less than the clip
    assert out["value"] == pytest.approx(0.5 * (2.4 - 0.5))


def test_value_term_is_half_the_squared_error_unless_told_otherwise():
    out = value_losses(3.0, 0.0, 0.5)
    assert out["value"] == out["total"] == pytest.approx(0.5 * 2.5**2)
    assert value_losses(3.0, 0.0, 0.5, value_loss="huber")["value"] == pytest.approx(0.5 * (2.5 - 0.5))


def test_the_surrogate_equals_a_loop_and_its_weights_weigh():
    data = batch()
    out = losses(PPOLoss(clip=0.1, entropy=0.3, value=0.7), data)
    policy, entropy, clipped, kl = [], [], [], []
    for k in range(64):
        p = data["logits"][k].softmax(-1)
        ratio = (p[data["action"][k]] / data["log_prob"][k].exp()).item()
        a = data["advantage"][k].item()
        policy.append(-min(ratio * a, min(max(ratio, 0.9), 1.1) * a))
        entropy.append(-(p * p.log()).sum().item())
        clipped.append(abs(ratio - 1) > 0.1)
        kl.append(ratio - 1 - math.log(ratio))
    value = 0.5 * (data["value"] - data["target"]).square().mean().item()
    mean = {key: sum(x) / 64 for key, x in (("policy", policy), ("entropy", entropy), ("kl", kl))}
    for key, expected in mean.items():
        assert out[key].item() == pytest.approx(expected, rel=1e-4)
    assert out["clipped"].item() == pytest.approx(sum(clipped) / 64)
    assert 0 < sum(clipped) < 64
    assert out["total"].item() == pytest.approx(mean["policy"] + 0.7 * value - 0.3 * mean["entropy"], rel=1e-4)


def test_real_actions_have_one_ratio_for_all_their_dimensions():
    mean, old = torch.randn(20, 3), torch.randn(20, 3) * 0.1
    action = torch.randn(20, 3)
    data = {key: entry[:20] for key, entry in batch().items() if key != "logits"}
    data.update(action=action, log_prob=Independent(Normal(mean + old, 0.8), 1).log_prob(action))
    out = PPOLoss()(Independent(Normal(mean, 0.8), 1), data.pop("value"), **data)
    z, z_old = (action - mean) / 0.8, (action - mean - old) / 0.8
    ratio = (0.5 * (z_old.square() - z.square())).sum(-1).exp()
    expected = -torch.min(ratio * data["advantage"], ratio.clamp(0.8, 1.2) * data["advantage"]).mean()
    torch.testing.assert_close(out["policy"], expected)


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


@pytest.mark.parametrize("clip", [0.0, 1.1, -0.1])
def test_a_clip_out_of_range_is_named(clip):
    with pytest.raises(RecipeError, match=r"PPOLoss.clip is .*; it must be a number above 0 and up to 1"):
        PPOLoss(clip=clip)
