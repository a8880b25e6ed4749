"""SAC learns what Stable-Baselines3's does, with a fixed and with a tuned entropy coefficient."""

import math

import pytest
import torch

from lightning_hyper.algorithms import SAC


def halves(layer):
    """A layer of means and log deviations as two, which is how Stable-Baselines3 has them."""
    return layer.weight.chunk(2), layer.bias.chunk(2)


def policies(model, theirs):
    weights, biases = halves(model.agent.actor.layers[-1])
    return [
        *zip(model.agent.actor.layers[:-1].parameters(), theirs.actor.latent_pi.parameters(), strict=True),
        *zip(weights, (theirs.actor.mu.weight, theirs.actor.log_std.weight), strict=True),
        *zip(biases, (theirs.actor.mu.bias, theirs.actor.log_std.bias), strict=True),
    ]


@pytest.fixture
def sac_peer(peer):
    def make(model, lr=1.0, **options):
        theirs = peer(model, policies, lr, **options)
        theirs.algorithm.actor.action_dist.epsilon = 0.0  # added to the density's denominator; ours has no need to
        if theirs.algorithm.ent_coef_optimizer is not None:
            theirs.algorithm.ent_coef_optimizer = torch.optim.SGD([theirs.algorithm.log_ent_coef], lr=lr)
        return theirs

    return make


def share_noise(monkeypatch, updates, size=32):
    """The noise of each update's two actions; ours draws that of the next state first, theirs that of the state."""
    noise = torch.randn(updates, 2, size, 2)
    ours, theirs = iter(noise.flatten(0, 1)), iter(noise.flip(1).flatten(0, 1))
    monkeypatch.setattr(torch, "randn_like", lambda _: next(ours))
    monkeypatch.setattr(torch.distributions.normal, "_standard_normal", lambda *_, **__: next(theirs))


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize(
    ("critic", "context", "shared_trunk", "spaces", "n_step"),
    [
        ("plain", "action", False, "unit", 3),
        ("plain", "action", False, "wide", 1),
        ("hyper", "state", False, "wide", 1),
        ("hyper", "state", True, "unit", 3),
        ("hyper", "action", False, "wide", 3),
        ("hyper", "action", True, "unit", 1),
        ("hyper", "constant", False, "wide", 1),
    ],
)
def test_losses_gradients_alpha_and_targets_equal_stable_baselines(
    tuned, critic, context, shared_trunk, spaces, n_step, built, drawn, given, sac_peer, monkeypatch
):
    model = built(
        SAC, spaces, critic, critic_context=[context], shared_trunk=shared_trunk, gamma=0.9, tau=0.1, alpha=0.3,
        tune_alpha=tuned,
    )  # fmt: skip
    theirs = sac_peer(model, ent_coef="auto_0.3" if tuned else 0.3)
    minibatch = drawn(spaces, n_step=n_step)
    share_noise(monkeypatch, 1)
    (measured,) = model.learn(given([minibatch]))
    theirs.train([minibatch])
    assert measured["critic"].item() == pytest.approx(theirs.recorded["train/critic_loss"], abs=1e-5)
    assert measured["actor"].item() == pytest.approx(theirs.recorded["train/actor_loss"], abs=1e-5)
    assert measured["alpha"].item() == pytest.approx(theirs.recorded["train/ent_coef"], abs=1e-6)
    theirs.assert_same_networks()
    if tuned:
        # Their loss of alpha is log alpha times its gradient, which at a rate of 1 is the step.
        step = math.log(0.3) - model.log_alpha.item()
        assert step * math.log(0.3) == pytest.approx(theirs.recorded["train/ent_coef_loss"], abs=1e-5)
        assert model.log_alpha.item() == pytest.approx(theirs.algorithm.log_ent_coef.item(), abs=1e-5)
        assert measured["entropy"].item() == pytest.approx(step - 2, abs=1e-5)
    else:
        assert model.log_alpha.item() == pytest.approx(math.log(0.3))


def test_four_updates_with_a_tuned_alpha_equal_stable_baselines(built, drawn, given, sac_peer, monkeypatch):
    model = built(SAC, lr=0.05, alpha=0.5, target_entropy=-1.3, critic_context=["action"])
    theirs = sac_peer(model, lr=0.05, ent_coef="auto_0.5", target_entropy=-1.3)
    minibatches = [drawn() for _ in range(4)]
    share_noise(monkeypatch, 4)
    measured = model.learn(given(minibatches))
    theirs.train(minibatches)
    mean = torch.stack([m["critic"] for m in measured]).mean().item()
    assert mean == pytest.approx(theirs.recorded["train/critic_loss"], rel=1e-5)
    theirs.assert_same_networks()
    assert model.log_alpha.item() == pytest.approx(theirs.algorithm.log_ent_coef.item(), abs=1e-5)


@pytest.mark.parametrize(("target", "direction"), [(50.0, 1), (-50.0, -1)])
def test_alpha_rises_where_the_entropy_is_below_its_target_and_falls_above_it(target, direction, built, drawn, given):
    model = built(SAC, alpha=0.2, target_entropy=target, lr=0.01)
    model.learn(given([drawn()]))
    assert math.copysign(1, model.log_alpha.exp().item() - 0.2) == direction


def test_the_target_entropy_is_minus_the_number_of_action_dimensions_unless_it_is_named(built, drawn, given):
    steps = []
    for target in (None, -2.0, -1.0):
        model = built(SAC, target_entropy=target)
        torch.manual_seed(2)
        model.learn(given([drawn()]))
        steps.append(model.log_alpha.item())
    assert steps[0] == steps[1]
    assert steps[2] - steps[1] == pytest.approx(1.0, abs=1e-5)


def test_a_fixed_alpha_is_no_parameter_of_the_optimiser(built):
    model = built(SAC, tune_alpha=False)
    assert [g["name"] for g in model.parameter_groups()] == ["actor", "critic"]
    assert [g["name"] for g in built(SAC).parameter_groups()] == ["actor", "critic", "alpha"]


def test_alpha_is_part_of_the_state(built, drawn, given):
    model, other = built(SAC, alpha=0.2), built(SAC, alpha=0.7)
    model.learn(given([drawn()]))
    other.load_state_dict(model.state_dict())
    assert other.log_alpha.item() == model.log_alpha.item()


def test_a_policy_step_leaves_the_critics_and_their_gradients_alone(built, drawn, given):
    model = built(SAC, critic="hyper")
    model.learn(given([drawn()]))
    assert all(p.grad is None for p in model.critics.parameters())
    assert all(p.grad is not None for p in model.agent.actor.parameters())


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"alpha": 0.0}, r"\.alpha is 0"),
        ({"alpha": -1.0}, r"\.alpha is -1"),
        ({"alpha_lr": 0.0}, r"\.alpha_lr is 0"),
    ],
)
def test_impossible_options_name_the_key(options, key):
    with pytest.raises(ValueError, match=key):
        SAC(**options)
