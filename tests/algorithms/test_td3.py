"""TD3 learns what Stable-Baselines3's does, and delays and clips what its paper says."""

import copy

import pytest
import torch

from lightning_hyper.algorithms import TD3


def policies(model, theirs):
    return [
        *zip(model.agent.actor.parameters(), theirs.actor.parameters(), strict=True),
        *zip(model.target_actor.parameters(), theirs.actor_target.parameters(), strict=True),
    ]


@pytest.mark.parametrize(
    ("critic", "context", "shared_trunk", "spaces", "n_step"),
    [
        ("plain", "action", False, "unit", 1),
        ("plain", "state", False, "wide", 3),
        ("hyper", "state", False, "wide", 1),
        ("hyper", "state", True, "unit", 3),
        ("hyper", "action", False, "wide", 3),
        ("hyper", "action", True, "wide", 1),
        ("hyper", "constant", False, "wide", 1),
        ("hyper", "constant", True, "wide", 1),
    ],
)
def test_losses_gradients_and_targets_equal_stable_baselines(
    critic, context, shared_trunk, spaces, n_step, built, drawn, given, peer
):
    model = built(
        TD3, spaces, critic, critic_context=[context], shared_trunk=shared_trunk, gamma=0.9, tau=0.1, policy_delay=1
    )
    theirs = peer(model, policies, policy_delay=1)
    before = copy.deepcopy(model)
    minibatch = drawn(spaces, n_step=n_step)
    torch.manual_seed(2)
    (measured,) = model.learn(given([minibatch]))
    torch.manual_seed(2)
    theirs.train([minibatch])
    assert measured["critic"].item() == pytest.approx(theirs.recorded["train/critic_loss"], abs=1e-5)
    assert measured["actor"].item() == pytest.approx(theirs.recorded["train/actor_loss"], abs=1e-5)
    theirs.assert_same_networks()
    for a, b in zip(before.agent.actor.parameters(), model.agent.actor.parameters(), strict=True):
        assert not torch.equal(a, b)


def test_four_updates_with_delay_equal_stable_baselines(built, drawn, given, peer):
    model = built(TD3, lr=0.05, target_noise=0.6, target_noise_clip=0.3)
    theirs = peer(model, policies, lr=0.05, target_policy_noise=0.6, target_noise_clip=0.3)
    minibatches = [drawn() for _ in range(4)]
    torch.manual_seed(2)
    measured = model.learn(given(minibatches))
    torch.manual_seed(2)
    theirs.train(minibatches)
    mean = torch.stack([m["critic"] for m in measured]).mean().item()
    assert mean == pytest.approx(theirs.recorded["train/critic_loss"])
    theirs.assert_same_networks()


def test_policy_and_targets_move_only_every_policy_delay_updates(built, drawn, given):
    model = built(TD3, policy_delay=3, lr=0.1)
    moved = []
    for _ in range(7):
        before = copy.deepcopy(model)
        (measured,) = model.learn(given([drawn()]))
        changed = {
            name: any(not torch.equal(a, b) for a, b in zip(x.parameters(), y.parameters(), strict=True))
            for name, x, y in (
                ("critics", before.critics, model.critics),
                ("policy", before.agent.actor, model.agent.actor),
                ("target critics", before.target_critics, model.target_critics),
                ("target policy", before.target_actor, model.target_actor),
            )
        }
        assert changed.pop("critics")
        assert len(set(changed.values())) == 1
        assert ("actor" in measured) == changed["policy"]
        moved.append(changed["policy"])
    assert moved == [False, False, True, False, False, True, False]


def test_the_delay_goes_on_where_a_saved_state_left_it(built, drawn, given):
    model, other = built(TD3, policy_delay=3), built(TD3, policy_delay=3)
    model.learn(given([drawn(), drawn()]))
    other.load_state(model.save_state())
    assert "actor" in other.learn(given([drawn()]))[0]


def test_noise_of_the_target_policy_is_clipped_and_its_action_stays_in_bounds(built, drawn, given):
    model = built(TD3, target_noise=10.0, target_noise_clip=0.5)
    seen = []
    model.target_critics.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    model.learn(given([drawn(size=500)]))
    ((window, action, _),) = seen
    with torch.no_grad():
        clean = torch.tanh(model.target_actor(window["observation"], window["observation"][:, :0]))
    low, high = (clean - 0.5).clamp(-1, 1), (clean + 0.5).clamp(-1, 1)
    assert ((action >= low - 1e-6) & (action <= high + 1e-6)).all()
    assert (((action - low).abs() < 1e-6) | ((action - high).abs() < 1e-6)).float().mean() > 0.9


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"exploration_noise": -0.1}, r"\.exploration_noise is -0.1"),
        ({"target_noise": -0.1}, r"\.target_noise is -0.1"),
        ({"target_noise_clip": -0.1}, r"\.target_noise_clip is -0.1"),
        ({"policy_delay": 0}, r"\.policy_delay is 0"),
    ],
)
def test_impossible_options_of_td3_name_the_key(options, key):
    with pytest.raises(ValueError, match=key):
        TD3(**options)
