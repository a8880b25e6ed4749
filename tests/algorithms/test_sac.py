"""SAC learns what Stable-Baselines3's does, with a fixed and with a tuned entropy coefficient."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from lightning_hyper.algorithms import SAC
from lightning_hyper.experience.replay import Replayed
from lightning_hyper.modules import Spaces
from lightning_hyper.nn import MLP, Concat, Hyper, ResidualTrunk

UNIT = Spaces(observation=3, task=0, actions=2, discrete=False, low=(-1.0, -1.0), high=(1.0, 1.0))
WIDE = Spaces(observation=3, task=0, actions=2, discrete=False, low=(-2.0, 1.0), high=(1.0, 5.0))
PLAIN = partial(Concat, hidden=[8, 7], activation="relu", hidden_init="default")
HYPER = partial(
    Hyper, hidden=[5], activation="relu", init="hyperfan_in", gain=True,
    trunk=partial(ResidualTrunk, widths=(6, 7), blocks=1),
)  # fmt: skip


def algorithm(spaces=WIDE, critic=PLAIN, lr=1.0, **options):
    """Built, with targets of their own, and with plain SGD: at a rate of 1 a step is minus the gradient."""
    model = SAC(actor=partial(MLP, hidden=[6, 5]), critic=critic, **options)
    torch.manual_seed(1)
    model.build(spaces)
    with torch.no_grad():
        for parameter in model.target_critics.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    groups = [{"name": g["name"], "params": g["params"]} for g in model.configure_optimizers().param_groups]
    optimizer = torch.optim.SGD(groups, lr=lr)
    model.optimizers = lambda use_pl_optimizer=True: optimizer
    model.manual_backward = lambda loss: loss.backward()
    model._trainer = SimpleNamespace(world_size=1)
    return model


def drawn(spaces=WIDE, size=32, n_step=1):
    low, high = torch.tensor(spaces.low), torch.tensor(spaces.high)
    steps = torch.randint(1, n_step + 1, (size,))
    return {
        "observation": torch.randn(size, 3),
        "action": low + (high - low) * torch.rand(size, 2),
        "reward": torch.randn(size, n_step) * (torch.arange(n_step) < steps[:, None]),
        "steps": steps,
        "next_observation": torch.randn(size, 3),
        "terminated": torch.rand(size) < 0.3,
    }


def learn(model, minibatches):
    collected = TensorDict({"observation": torch.zeros(2, 5, 3)}, [2])
    return model.learn(Replayed(collected, len(minibatches), lambda seen: map(seen, minibatches), None))


# --- Against Stable-Baselines3 --------------------------------------------------------------------------------------


class Borrowed(nn.Module):
    """Our critics as Stable-Baselines3 calls its own."""

    def __init__(self, critics, lr):
        super().__init__()
        self.critics = copy.deepcopy(critics).requires_grad_(True)
        self.optimizer = torch.optim.SGD(self.critics.parameters(), lr=lr)

    def forward(self, observation, action):
        return tuple(value.unsqueeze(-1) for value in self.critics(observation, action))


def linears(network):
    return [layer for layer in network.modules() if isinstance(layer, nn.Linear)]


def copy_linears(ours, theirs):
    with torch.no_grad():
        for a, b in zip(linears(ours), linears(theirs), strict=True):
            b.weight.copy_(a.weight)
            b.bias.copy_(a.bias)


def halves(layer):
    """A layer of means and log deviations as two, which is how Stable-Baselines3 has them."""
    return layer.weight.chunk(2), layer.bias.chunk(2)


def peer(model, spaces, lr=1.0, **options):
    """Stable-Baselines3's SAC with our weights, and plain SGD for all that it optimises."""
    gym = pytest.importorskip("gymnasium")
    sb3 = pytest.importorskip("stable_baselines3")
    import numpy as np

    class Env(gym.Env):
        observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        action_space = gym.spaces.Box(np.float32(spaces.low), np.float32(spaces.high))

    theirs = sb3.SAC(
        "MlpPolicy", Env(), learning_rate=lr, buffer_size=1, gamma=model.gamma, tau=model.tau, device="cpu",
        policy_kwargs={"net_arch": {"pi": [6, 5], "qf": [8, 7]}, "optimizer_class": torch.optim.SGD}, **options,
    )  # fmt: skip
    theirs.recorded = {}
    theirs._logger = SimpleNamespace(record=lambda key, value, **_: theirs.recorded.update({key: value}))
    theirs.actor.action_dist.epsilon = 0.0  # it adds 1e-6 to the density's denominator; ours has no need to
    if theirs.ent_coef_optimizer is not None:
        theirs.ent_coef_optimizer = torch.optim.SGD([theirs.log_ent_coef], lr=lr)
    network = model.agent.network
    copy_linears(network.body, theirs.actor.latent_pi)
    with torch.no_grad():
        for k, layer in enumerate((theirs.actor.mu, theirs.actor.log_std)):
            weights, biases = halves(network.head)
            layer.weight.copy_(weights[k])
            layer.bias.copy_(biases[k])
    if isinstance(model.critics.first, Concat):
        for ours, other in ((model.critics, theirs.critic), (model.target_critics, theirs.critic_target)):
            copy_linears(ours.first, other.qf0)
            copy_linears(ours.second, other.qf1)
    else:
        theirs.critic, theirs.critic_target = Borrowed(model.critics, lr), Borrowed(model.target_critics, lr)
    return theirs


def feed(theirs, minibatches, gamma, spaces):
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    low, high = torch.tensor(spaces.low), torch.tensor(spaces.high)
    samples = iter(
        ReplayBufferSamples(
            observations=m["observation"],
            actions=2 * (m["action"] - low) / (high - low) - 1,
            next_observations=m["next_observation"],
            dones=m["terminated"].float().unsqueeze(-1),
            rewards=torch.stack([sum(gamma**k * r[k] for k in range(len(r))) for r in m["reward"]]).unsqueeze(-1),
            discounts=(gamma ** m["steps"].float()).unsqueeze(-1),
        )
        for m in minibatches
    )
    theirs.replay_buffer = SimpleNamespace(sample=lambda *_, **__: next(samples))


def share_noise(monkeypatch, updates, size=32):
    """The noise of each update's two actions; ours draws that of the next state first, theirs that of the state."""
    noise = torch.randn(updates, 2, size, 2)
    ours, theirs = iter(noise.flatten(0, 1)), iter(noise.flip(1).flatten(0, 1))
    monkeypatch.setattr(torch, "randn_like", lambda _: next(ours))
    monkeypatch.setattr(torch.distributions.normal, "_standard_normal", lambda *_, **__: next(theirs))


def assert_same_networks(model, theirs):
    if isinstance(theirs.critic, Borrowed):
        pairs = [
            *zip(model.critics.parameters(), theirs.critic.parameters(), strict=True),
            *zip(model.target_critics.parameters(), theirs.critic_target.parameters(), strict=True),
        ]
    else:
        pairs = []
        for ours, other in ((model.critics, theirs.critic), (model.target_critics, theirs.critic_target)):
            for a, b in ((ours.first, other.qf0), (ours.second, other.qf1)):
                pairs += zip(a.parameters(), b.parameters(), strict=True)
    network, actor = model.agent.network, theirs.actor
    pairs += zip(network.body.parameters(), actor.latent_pi.parameters(), strict=True)
    weights, biases = halves(network.head)
    pairs += [(weights[0], actor.mu.weight), (weights[1], actor.log_std.weight)]
    pairs += [(biases[0], actor.mu.bias), (biases[1], actor.log_std.bias)]
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize(
    ("critic", "order", "shared_trunk", "spaces", "n_step"),
    [
        (PLAIN, "AS", False, UNIT, 3),
        (PLAIN, "AS", False, WIDE, 1),
        (HYPER, "SA", False, WIDE, 1),
        (HYPER, "SA", True, UNIT, 3),
        (HYPER, "AS", False, WIDE, 3),
        (HYPER, "AS", True, UNIT, 1),
        (HYPER, "constant", False, WIDE, 1),
    ],
)
def test_losses_gradients_alpha_and_targets_equal_stable_baselines(
    tuned, critic, order, shared_trunk, spaces, n_step, monkeypatch
):
    model = algorithm(
        spaces=spaces, critic=critic, order=order, shared_trunk=shared_trunk, gamma=0.9, tau=0.1, alpha=0.3,
        tune_alpha=tuned,
    )  # fmt: skip
    theirs = peer(model, spaces, ent_coef="auto_0.3" if tuned else 0.3)
    minibatch = drawn(spaces, n_step=n_step)
    feed(theirs, [minibatch], 0.9, spaces)
    share_noise(monkeypatch, 1)
    (measured,) = learn(model, [minibatch])
    theirs.train(gradient_steps=1)
    assert measured["critic"].item() == pytest.approx(theirs.recorded["train/critic_loss"], abs=1e-5)
    assert measured["actor"].item() == pytest.approx(theirs.recorded["train/actor_loss"], abs=1e-5)
    assert measured["alpha"].item() == pytest.approx(theirs.recorded["train/ent_coef"], abs=1e-6)
    assert_same_networks(model, theirs)
    if tuned:
        # Their loss of alpha is log alpha times its gradient, which at a rate of 1 is the step.
        step = math.log(0.3) - model.log_alpha.item()
        assert step * math.log(0.3) == pytest.approx(theirs.recorded["train/ent_coef_loss"], abs=1e-5)
        assert model.log_alpha.item() == pytest.approx(theirs.log_ent_coef.item(), abs=1e-5)
        assert measured["entropy"].item() == pytest.approx(step - 2, abs=1e-5)
    else:
        assert model.log_alpha.item() == pytest.approx(math.log(0.3))


def test_four_updates_with_a_tuned_alpha_equal_stable_baselines(monkeypatch):
    model = algorithm(lr=0.05, alpha=0.5, target_entropy=-1.3, order="AS")
    theirs = peer(model, WIDE, lr=0.05, ent_coef="auto_0.5", target_entropy=-1.3)
    minibatches = [drawn() for _ in range(4)]
    feed(theirs, minibatches, model.gamma, WIDE)
    share_noise(monkeypatch, 4)
    measured = learn(model, minibatches)
    theirs.train(gradient_steps=4)
    mean = torch.stack([m["critic"] for m in measured]).mean().item()
    assert mean == pytest.approx(theirs.recorded["train/critic_loss"], rel=1e-5)
    assert_same_networks(model, theirs)
    assert model.log_alpha.item() == pytest.approx(theirs.log_ent_coef.item(), abs=1e-5)


# --- Alpha ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "direction"), [(50.0, 1), (-50.0, -1)])
def test_alpha_rises_where_the_entropy_is_below_its_target_and_falls_above_it(target, direction):
    model = algorithm(alpha=0.2, target_entropy=target, lr=0.01)
    learn(model, [drawn()])
    assert math.copysign(1, model.log_alpha.exp().item() - 0.2) == direction


def test_the_target_entropy_is_minus_the_number_of_action_dimensions_unless_it_is_named():
    steps = []
    for target in (None, -2.0, -1.0):
        model = algorithm(target_entropy=target)
        torch.manual_seed(2)
        learn(model, [drawn()])
        steps.append(model.log_alpha.item())
    assert steps[0] == steps[1]
    assert steps[2] - steps[1] == pytest.approx(1.0, abs=1e-5)


def test_a_fixed_alpha_is_no_parameter_of_the_optimiser():
    model = algorithm(tune_alpha=False)
    assert [g["name"] for g in model.configure_optimizers().param_groups] == ["actor", "critic"]
    assert [g["name"] for g in algorithm().configure_optimizers().param_groups] == ["actor", "critic", "alpha"]


def test_alpha_is_part_of_the_state():
    model, other = algorithm(alpha=0.2), algorithm(alpha=0.7)
    learn(model, [drawn()])
    other.load_state_dict(model.state_dict())
    assert other.log_alpha.item() == model.log_alpha.item()


def test_a_policy_step_leaves_the_critics_and_their_gradients_alone():
    model = algorithm(critic=HYPER)
    learn(model, [drawn()])
    assert all(p.grad is None for p in model.critics.parameters())
    assert all(p.grad is not None for p in model.agent.network.parameters())


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"alpha": 0.0}, "model.alpha is 0"),
        ({"alpha": -1.0}, "model.alpha is -1"),
        ({"alpha_lr": 0.0}, "model.alpha_lr is 0"),
    ],
)
def test_impossible_options_name_the_key(options, key):
    with pytest.raises(ValueError, match=key):
        algorithm(**options)
