"""TD3 learns what Stable-Baselines3's does, and what it shares with SAC is what the formulas say."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from lightning_hyper.algorithms import SAC, TD3
from lightning_hyper.algorithms.base import NonFiniteLossError
from lightning_hyper.experience.replay import Replayed
from lightning_hyper.experience.replay_buffer import CompactReplayBuffer
from lightning_hyper.modules import Spaces
from lightning_hyper.modules.critic import frozen
from lightning_hyper.nn import MLP, Concat, Hyper, ResidualTrunk

UNIT = Spaces(observation=3, task=0, actions=2, discrete=False, low=(-1.0, -1.0), high=(1.0, 1.0))
WIDE = Spaces(observation=3, task=0, actions=2, discrete=False, low=(-2.0, 1.0), high=(1.0, 5.0))
PLAIN = partial(Concat, hidden=[8, 7], activation="relu", hidden_init="default")
HYPER = partial(
    Hyper, hidden=[5], activation="relu", init="hyperfan_in", gain=True,
    trunk=partial(ResidualTrunk, widths=(6, 7), blocks=1),
)  # fmt: skip


def algorithm(cls=TD3, spaces=WIDE, critic=PLAIN, lr=1.0, **options):
    """Built, with targets of their own, and with plain SGD: at a rate of 1 a step is minus the gradient."""
    model = cls(actor=partial(MLP, hidden=[6, 5]), critic=critic, **options)
    torch.manual_seed(1)
    model.build(spaces)
    with torch.no_grad():
        for target in (model.target_critics, getattr(model, "target_agent", nn.Module())):
            for parameter in target.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    groups = [{"name": g["name"], "params": g["params"]} for g in model.configure_optimizers().param_groups]
    optimizer = torch.optim.SGD(groups, lr=lr)
    model.optimizers = lambda use_pl_optimizer=True: optimizer
    model.manual_backward = lambda loss: loss.backward()
    model._trainer = SimpleNamespace(world_size=1)
    return model


def drawn(spaces=WIDE, size=32, n_step=1, **entries):
    """A minibatch as a replay buffer draws it, with all ends that there are."""
    low, high = torch.tensor(spaces.low), torch.tensor(spaces.high)
    steps = torch.randint(1, n_step + 1, (size,))
    return {
        "observation": torch.randn(size, 3),
        "action": low + (high - low) * torch.rand(size, 2),
        "reward": torch.randn(size, n_step) * (torch.arange(n_step) < steps[:, None]),
        "steps": steps,
        "next_observation": torch.randn(size, 3),
        "terminated": torch.rand(size) < 0.3,
        **entries,
    }


def replayed(minibatches, prioritize=None):
    collected = TensorDict(
        {"observation": torch.arange(30.0).view(2, 5, 3), "next": {"done": torch.zeros(2, 5, 1)}}, [2]
    )

    def given(seen):
        for minibatch in minibatches:
            yield {**seen(minibatch), **{key: minibatch[key] for key in ("index", "weight") if key in minibatch}}

    return Replayed(collected, len(minibatches), given, prioritize)


# --- Against Stable-Baselines3 --------------------------------------------------------------------------------------


def policies(model, theirs):
    return [
        *zip(model.agent.network.parameters(), theirs.actor.parameters(), strict=True),
        *zip(model.target_agent.parameters(), theirs.actor_target.parameters(), strict=True),
    ]


@pytest.mark.parametrize(
    ("critic", "order", "shared_trunk", "spaces", "n_step"),
    [
        (PLAIN, "AS", False, UNIT, 1),
        (PLAIN, "SA", False, WIDE, 3),
        (HYPER, "SA", False, WIDE, 1),
        (HYPER, "SA", True, UNIT, 3),
        (HYPER, "AS", False, WIDE, 3),
        (HYPER, "AS", True, WIDE, 1),
        (HYPER, "constant", False, WIDE, 1),
        (HYPER, "constant", True, WIDE, 1),
    ],
)
def test_losses_gradients_and_targets_equal_stable_baselines(critic, order, shared_trunk, spaces, n_step, peer):
    model = algorithm(
        spaces=spaces, critic=critic, order=order, shared_trunk=shared_trunk, gamma=0.9, tau=0.1, policy_delay=1
    )
    theirs = peer(model, spaces, policies, policy_delay=1)
    before = copy.deepcopy(model)
    minibatch = drawn(spaces, n_step=n_step)
    torch.manual_seed(2)
    (measured,) = model.learn(replayed([minibatch]))
    torch.manual_seed(2)
    theirs.train([minibatch])
    assert measured["critic"].item() == pytest.approx(theirs.recorded["train/critic_loss"], abs=1e-5)
    assert measured["actor"].item() == pytest.approx(theirs.recorded["train/actor_loss"], abs=1e-5)
    theirs.assert_same_networks()
    for a, b in zip(before.agent.network.parameters(), model.agent.network.parameters(), strict=True):
        assert not torch.equal(a, b)


def test_four_updates_with_delay_equal_stable_baselines(peer):
    model = algorithm(lr=0.05, target_noise=0.6, target_noise_clip=0.3)
    theirs = peer(model, WIDE, policies, lr=0.05, target_policy_noise=0.6, target_noise_clip=0.3)
    minibatches = [drawn() for _ in range(4)]
    torch.manual_seed(2)
    measured = model.learn(replayed(minibatches))
    torch.manual_seed(2)
    theirs.train(minibatches)
    mean = torch.stack([m["critic"] for m in measured]).mean().item()
    assert mean == pytest.approx(theirs.recorded["train/critic_loss"])
    theirs.assert_same_networks()


# --- TD3 ------------------------------------------------------------------------------------------------------------


def test_policy_and_targets_move_only_every_policy_delay_updates():
    model = algorithm(policy_delay=3, lr=0.1)
    moved = []
    for _ in range(7):
        before = copy.deepcopy(model)
        (measured,) = model.learn(replayed([drawn()]))
        changed = {
            name: any(not torch.equal(a, b) for a, b in zip(x.parameters(), y.parameters(), strict=True))
            for name, x, y in (
                ("critics", before.critics, model.critics),
                ("policy", before.agent.network, model.agent.network),
                ("target critics", before.target_critics, model.target_critics),
                ("target policy", before.target_agent, model.target_agent),
            )
        }
        assert changed.pop("critics")
        assert len(set(changed.values())) == 1
        assert ("actor" in measured) == changed["policy"]
        moved.append(changed["policy"])
    assert moved == [False, False, True, False, False, True, False]


def test_the_delay_goes_on_where_a_checkpoint_left_it():
    model, other = algorithm(policy_delay=3), algorithm(policy_delay=3)
    model.spaces = other.spaces = WIDE
    model.learn(replayed([drawn(), drawn()]))
    checkpoint = {}
    model.on_save_checkpoint(checkpoint)
    other.on_load_checkpoint(checkpoint)
    assert "actor" in other.learn(replayed([drawn()]))[0]


def test_noise_of_the_target_policy_is_clipped_and_its_action_stays_in_bounds():
    model = algorithm(target_noise=10.0, target_noise_clip=0.5)
    seen = []
    model.target_critics.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    model.learn(replayed([drawn(size=500)]))
    ((state, action),) = seen
    with torch.no_grad():
        clean = torch.tanh(model.target_agent(state))
    low, high = (clean - 0.5).clamp(-1, 1), (clean + 0.5).clamp(-1, 1)
    assert ((action >= low - 1e-6) & (action <= high + 1e-6)).all()
    assert (((action - low).abs() < 1e-6) | ((action - high).abs() < 1e-6)).float().mean() > 0.9


# --- What TD3 and SAC share -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [TD3, SAC])
@pytest.mark.parametrize("order", ["SA", "AS", "constant"])
def test_a_policy_step_has_the_same_gradient_with_frozen_critics(cls, order):
    model = algorithm(cls, critic=HYPER, order=order)
    seen = model.seen(drawn())

    def gradient():
        torch.manual_seed(3)
        return torch.autograd.grad(model.actor_loss(seen)[0], list(model.agent.network.parameters()))

    free = gradient()
    with frozen(model.critics):
        held = gradient()
    for a, b in zip(free, held, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("cls", [TD3, SAC])
@pytest.mark.parametrize(("order", "graph"), [("SA", False), ("AS", True)])
def test_a_policy_step_keeps_a_graph_of_the_trunk_only_where_the_trunk_sees_actions(cls, order, graph):
    model = algorithm(cls, critic=HYPER, order=order, **({"policy_delay": 1} if cls is TD3 else {}))
    kept = []
    model.critics.first.trunk.register_forward_hook(lambda _, inputs, z: kept.append(z.requires_grad))
    model.learn(replayed([drawn()]))
    assert kept == [True, graph]  # the critics' step, then the policy's
    assert all(p.requires_grad for p in model.critics.parameters())
    assert all(p.grad is None for p in model.critics.parameters())


@pytest.mark.parametrize("cls", [TD3, SAC])
def test_targets_add_up_n_rewards_bootstrap_after_truncation_and_not_after_termination(cls):
    gamma, n_step, length = 0.8, 3, 9
    model = algorithm(cls, gamma=gamma, critic=HYPER)
    done, terminated = torch.zeros(2, length, 1, dtype=torch.bool), torch.zeros(2, length, 1, dtype=torch.bool)
    done[0, 4], done[1, 5] = True, True
    terminated[1, 5] = True  # environment 0 is truncated, environment 1 terminates
    batch = TensorDict(
        {
            "observation": torch.randn(2, length, 3),
            "action": torch.rand(2, length, 2),
            "next": {
                "observation": torch.randn(2, length, 3), "reward": torch.randn(2, length, 1), "done": done,
                "terminated": terminated,
            },
        },
        batch_size=[2, length],
    )  # fmt: skip
    fresh, carried = batch["observation"][:, 1:], batch["next", "observation"][:, :-1]
    batch["observation"][:, 1:] = torch.where(done[:, :-1], fresh, carried)
    buffer = CompactReplayBuffer(2 * length, 2, n_step=n_step)
    buffer.extend(batch)
    torch.manual_seed(4)
    (minibatch,) = buffer.minibatches(1, 300, model.seen)
    place = (minibatch["observation"][:, None, None] == batch["observation"]).all(-1).nonzero()
    assert place[:, 0].equal(torch.arange(300))
    last, total, powers = [], torch.zeros(300), []
    for k, (n, t) in enumerate(place[:, 1:].tolist()):
        for j in range(n_step):
            total[k] += gamma**j * batch["next", "reward"][n, t + j, 0]
            if done[n, t + j] or t + j == length - 1:
                break
        last.append((n, t + j))
        powers.append(0.0 if terminated[n, t + j] else gamma ** (j + 1))
    assert {0.0, gamma, gamma**2, gamma**3} == set(powers)
    after = torch.stack([batch["next", "observation"][n, t] for n, t in last])
    with torch.no_grad():
        torch.manual_seed(5)
        if cls is TD3:
            action = (torch.tanh(model.target_agent(after)) + (0.2 * torch.randn(300, 2)).clamp(-0.5, 0.5)).clamp(-1, 1)
            value = torch.minimum(*model.target_critics(after, action))
        else:
            action, log_prob = model.agent.sample(after)
            value = torch.minimum(*model.target_critics(after, action)) - log_prob
        target = total + torch.tensor(powers) * value
        action = batch["action"][place[:, 1], place[:, 2]]
        scaled = 2 * (action - torch.tensor([-2.0, 1.0])) / torch.tensor([3.0, 4.0]) - 1
        first = model.critics.value(minibatch["observation"], scaled)
    torch.manual_seed(5)
    _, _, error = model.critic_loss(minibatch)
    torch.testing.assert_close(error, (first - target).abs(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", [TD3, SAC])
def test_weights_of_a_prioritised_sample_weigh_its_squared_errors(cls, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    minibatch, weight = drawn(), torch.tensor([2.0] * 16 + [0.0] * 16)
    model, expected = algorithm(cls, critic=HYPER), algorithm(cls, critic=HYPER)
    given = []
    sample = {**minibatch, "index": torch.arange(32), "weight": weight}
    model.learn(replayed([sample], lambda *prioritized: given.append(prioritized)))
    expected.learn(replayed([{key: entry[:16] for key, entry in minibatch.items()}]))
    for a, b in zip(model.critics.parameters(), expected.critics.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    ((index, error),) = given
    assert index.equal(torch.arange(32))
    assert error.shape == (32,)
    assert not error.requires_grad
    assert (error >= 0).all()


def test_statistics_of_observations_take_in_what_was_collected_before_the_updates():
    model = algorithm(normalize_observation=True)
    batch = replayed([drawn()])
    batch.collected["observation"].mul_(3).add_(2)
    model.learn(batch)
    rows = batch.collected["observation"].flatten(0, 1).double()
    minibatch = drawn()
    seen = model.seen(minibatch)
    for key in ("observation", "next_observation"):
        expected = (minibatch[key] - rows.mean(0)) / rows.std(0, unbiased=False)
        torch.testing.assert_close(seen[key], expected.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cls", [TD3, SAC])
def test_a_loss_that_is_not_finite_stops_training(cls):
    model = algorithm(cls)
    model.log_dict = lambda *_, **__: None
    bad = drawn()
    bad["reward"][3] = torch.nan
    with pytest.raises(NonFiniteLossError, match="critic is nan in update 2 of 3 on the batch that ends at frame 10"):
        model.training_step(replayed([drawn(), bad, drawn()]), 0)
    assert model.clock.frames == 0


@pytest.mark.parametrize("cls", [TD3, SAC])
@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"actor_lr": 0.0}, "model.actor_lr is 0"),
        ({"critic_lr": -1.0}, "model.critic_lr is -1"),
        ({"gamma": 1.5}, "model.gamma is 1.5"),
        ({"gamma": -0.1}, "model.gamma is -0.1"),
        ({"tau": 2.0}, "model.tau is 2"),
        ({"lr_schedule": "cosine"}, "model.lr_schedule is 'cosine'"),
        ({"max_grad_norm": 0.0}, "model.max_grad_norm is 0"),
        ({"order": "XY"}, "model.order is 'XY'"),
        ({"shared_trunk": True}, "model.shared_trunk"),
        ({"spaces": Spaces(observation=3, task=0, actions=4, discrete=True)}, "discrete actions"),
        ({"spaces": Spaces(observation=3, task=0, actions=2, discrete=False)}, "unbounded actions"),
        (
            {"spaces": Spaces(3, 0, 2, discrete=False, low=(-1.0, -torch.inf), high=(1.0, 1.0))},
            "unbounded actions",
        ),
    ],
)
def test_impossible_options_name_the_key(cls, options, key):
    with pytest.raises(ValueError, match=key):
        algorithm(cls, **options)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"exploration_noise": -0.1}, "model.exploration_noise is -0.1"),
        ({"target_noise": -0.1}, "model.target_noise is -0.1"),
        ({"target_noise_clip": -0.1}, "model.target_noise_clip is -0.1"),
        ({"policy_delay": 0}, "model.policy_delay is 0"),
    ],
)
def test_impossible_options_of_td3_name_the_key(options, key):
    with pytest.raises(ValueError, match=key):
        algorithm(**options)
