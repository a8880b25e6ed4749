"""Policies with bounded actions: densities, noise and units."""

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform
from torchrl.envs.utils import ExplorationType, set_exploration_type

from lightning_hyper.modules import Spaces
from lightning_hyper.modules.policies import DeterministicPolicy, GaussianPolicy
from lightning_hyper.nn import MLP

LOW, HIGH = (-2.0, 1.0), (1.0, 5.0)
WIDE = Spaces(observation=3, task=0, actions=2, discrete=False, low=LOW, high=HIGH)
UNIT = Spaces(observation=3, task=0, actions=2, discrete=False, low=(-1.0, -1.0), high=(1.0, 1.0))
SMALL = partial(MLP, hidden=[8])
MAKES = [partial(DeterministicPolicy, noise=0.2), GaussianPolicy]


class Given(nn.Module):
    """A network whose output is its input: what the policy makes of chosen numbers."""

    def __init__(self, features, outputs):
        super().__init__()

    def forward(self, x):
        return x


def acted(policy, observation, mode=ExplorationType.RANDOM):
    with set_exploration_type(mode), torch.no_grad():
        return policy(TensorDict({"observation": observation}, [len(observation)]))["action"]


# --- Density --------------------------------------------------------------------------------------------------------


def sampled(mean, log_std, noise, monkeypatch):
    """Actions and log-densities of a Gaussian policy for the noise `[size, actions]` that it would draw."""
    monkeypatch.setattr(torch, "randn_like", lambda x: noise.to(x))
    policy = GaussianPolicy(UNIT, Given)
    numbers = torch.cat([mean, log_std], -1).requires_grad_()
    return *policy.sample(numbers), numbers


def test_log_density_equals_that_of_a_squashed_normal(monkeypatch):
    mean, log_std, noise = 0.7 * torch.randn(200, 2), torch.rand(200, 2) * 3 - 3, torch.randn(200, 2)
    action, log_prob, _ = sampled(mean, log_std, noise, monkeypatch)
    raw = mean.double() + log_std.double().exp() * noise.double()
    expected = TransformedDistribution(Normal(mean.double(), log_std.double().exp()), TanhTransform(cache_size=1))
    torch.testing.assert_close(action, torch.tanh(raw).float(), atol=1e-6, rtol=1e-5)
    # The base density and its transform apart: tanh(raw) alone does not tell raw far out.
    jacobian = TanhTransform().log_abs_det_jacobian(raw, raw.tanh())
    density = Normal(mean.double(), log_std.double().exp()).log_prob(raw) - jacobian
    torch.testing.assert_close(log_prob, density.sum(-1).float(), atol=1e-4, rtol=1e-4)
    near = (raw.abs() < 2).all(-1)
    assert near.sum() > 100
    through_action = expected.log_prob(raw.tanh()).sum(-1)
    torch.testing.assert_close(log_prob[near], through_action[near].float(), atol=1e-4, rtol=1e-4)


def test_gradients_of_actions_and_densities_equal_those_of_a_squashed_normal(monkeypatch):
    mean, log_std, noise = torch.randn(50, 2), torch.rand(50, 2) * 2 - 2, torch.randn(50, 2)
    action, log_prob, numbers = sampled(mean, log_std, noise, monkeypatch)
    (ours,) = torch.autograd.grad((action.sum(-1) + log_prob).sum(), numbers)
    m, s = mean.double().requires_grad_(), log_std.double().requires_grad_()
    base = Normal(m, s.exp())
    raw = m + s.exp() * noise.double()
    log_density = base.log_prob(raw) - torch.log1p(-raw.tanh().square())
    expected = torch.autograd.grad((raw.tanh() + log_density).sum(), [m, s])
    torch.testing.assert_close(ours, torch.cat(expected, -1).float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mean", [-300.0, -30.0, 30.0, 300.0])
@pytest.mark.parametrize("log_std", [-40.0, -20.0, 0.0, 2.0, 40.0])
def test_densities_and_gradients_stay_finite_far_out(mean, log_std, monkeypatch):
    noise = torch.tensor([[4.0, -4.0]])
    action, log_prob, numbers = sampled(torch.full((1, 2), mean), torch.full((1, 2), log_std), noise, monkeypatch)
    log_prob.sum().backward()
    assert action.abs().max() <= 1
    assert log_prob.isfinite().all()
    assert numbers.grad.isfinite().all()
    held = min(max(log_std, -20.0), 2.0)
    raw = torch.full((1, 2), mean).double() + torch.tensor(held).double().exp() * noise.double()
    density = -8 - held - 0.5 * torch.tensor(2 * torch.pi).log() - TanhTransform().log_abs_det_jacobian(raw, None)
    torch.testing.assert_close(log_prob, density.sum(-1).float(), atol=1e-3, rtol=1e-5)


def test_acting_draws_from_the_density_that_losses_use():
    policy = GaussianPolicy(UNIT, Given)
    numbers = torch.tensor([0.3, -0.5, -1.0, 0.2]).expand(20_000, 4)
    drawn = acted(policy, numbers)
    u = torch.linspace(0.005, 0.995, 100)
    for k in range(2):
        law = TransformedDistribution(Normal(numbers[0, k], numbers[0, 2 + k].exp()), TanhTransform())
        torch.testing.assert_close(law.cdf(drawn[:, k].quantile(u)), u, atol=0.015, rtol=0)


# --- Acting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("spaces", [UNIT, WIDE])
def test_noise_is_there_when_exploring_and_only_then(make, spaces):
    policy, x = make(spaces, SMALL), torch.randn(50, 3)
    still = [acted(policy, x, ExplorationType.DETERMINISTIC) for _ in range(2)]
    wild = [acted(policy, x, ExplorationType.RANDOM) for _ in range(2)]
    assert torch.equal(*still)
    assert (wild[0] != wild[1]).float().mean() > 0.9
    low, high = torch.tensor(spaces.low), torch.tensor(spaces.high)
    middle, half = (low + high) / 2, (high - low) / 2
    with torch.no_grad():
        torch.testing.assert_close(still[0], middle + half * policy.network(x)[:, :2].tanh())


@pytest.mark.parametrize("make", MAKES)
def test_actions_are_in_the_environments_units_and_bounds(make):
    policy = make(WIDE, SMALL)
    with torch.no_grad():
        policy.network.head.weight.mul_(100)
    actions = acted(policy, torch.randn(500, 3))
    low, high = torch.tensor(LOW), torch.tensor(HIGH)
    assert ((actions >= low) & (actions <= high)).all()
    torch.testing.assert_close(actions.amin(0), low, atol=1e-3, rtol=0)
    torch.testing.assert_close(actions.amax(0), high, atol=1e-3, rtol=0)
    scaled = policy.scaled(torch.stack([low, high, (low + high) / 2]))
    torch.testing.assert_close(scaled, torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]]))


def test_exploration_noise_has_its_deviation_in_half_ranges():
    policy = DeterministicPolicy(WIDE, SMALL, noise=0.1)
    with torch.no_grad():
        policy.network.head.weight.zero_(), policy.network.head.bias.zero_()
    actions = acted(policy, torch.randn(20_000, 3))
    torch.testing.assert_close(actions.mean(0), torch.tensor([-0.5, 3.0]), atol=0.01, rtol=0)
    torch.testing.assert_close(actions.std(0), torch.tensor([0.15, 0.2]), atol=0.005, rtol=0)


@pytest.mark.parametrize("make", MAKES)
def test_observations_are_standardised_where_that_is_asked_for(make):
    seen, x = 3 * torch.randn(100, 3) + 2, torch.randn(20, 3)
    policy, plain = make(WIDE, SMALL, normalize_observation=True), make(WIDE, SMALL)
    plain.network.load_state_dict(policy.network.state_dict())
    policy.observe(seen), plain.observe(seen)
    expected = acted(plain, (x - seen.mean(0)) / seen.std(0, unbiased=False), ExplorationType.DETERMINISTIC)
    torch.testing.assert_close(acted(policy, x, ExplorationType.DETERMINISTIC), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize(
    ("spaces", "kind"),
    [
        (Spaces(observation=3, task=0, actions=4, discrete=True), "discrete"),
        (Spaces(observation=3, task=0, actions=2, discrete=False), "unbounded"),
        (Spaces(3, 0, 1, discrete=False, low=(-1.0,), high=(torch.inf,)), "unbounded"),
    ],
)
def test_actions_without_bounds_are_refused(make, spaces, kind):
    with pytest.raises(ValueError, match=f"data.env has {kind} actions"):
        make(spaces, SMALL)
