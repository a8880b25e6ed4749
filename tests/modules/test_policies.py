"""Policies with bounded actions: densities, noise, units, and what they are conditioned on."""

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform
from torchrl.envs.utils import ExplorationType, set_exploration_type

from lightning_hyper.checks import RecipeError
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.modules import Contexts, OneHotContext, RecurrentContext, TaskContext
from lightning_hyper.modules.policies import DeterministicPolicy, GaussianPolicy
from lightning_hyper.nn import GRU, MLP, Concat, Hyper, VectorEncoder

LOW, HIGH = (-2.0, 1.0), (1.0, 5.0)
WIDE = Spaces(observation=(3,), actions=2, discrete=False, low=LOW, high=HIGH)
UNIT = Spaces(observation=(3,), actions=2, discrete=False, low=(-1.0, -1.0), high=(1.0, 1.0))
TASKS = Spaces(observation=(3,), actions=2, discrete=False, low=LOW, high=HIGH, task=4)
INDEX = Spaces(observation=(3,), actions=2, discrete=False, low=LOW, high=HIGH, tasks=("a", "b", "c"))
SMALL = partial(MLP, hidden=[8])
MAKES = [partial(DeterministicPolicy, noise=0.2), GaussianPolicy]


class Given(nn.Module):
    """A network whose output is its input: what the policy makes of chosen numbers."""

    def __init__(self, features, context, outputs):
        super().__init__()

    def forward(self, x, context):
        return x


def without(x):
    """No context."""
    return Contexts(x[..., :0])


def acted(policy, observation, mode=ExplorationType.RANDOM):
    with set_exploration_type(mode), torch.no_grad():
        return policy(TensorDict({"observation": observation}, [len(observation)]))["action"]


# --- Density --------------------------------------------------------------------------------------------------------


def sampled(mean, log_std, noise, monkeypatch):
    """Actions and log-densities of a Gaussian policy for the noise `[size, actions]` that it would draw."""
    monkeypatch.setattr(torch, "randn_like", lambda x: noise.to(x))
    policy = GaussianPolicy(UNIT, Given)
    numbers = torch.cat([mean, log_std], -1).requires_grad_()
    return *policy.sample(numbers, without(numbers)), numbers


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
        torch.testing.assert_close(still[0], middle + half * policy.actor(x, x[:, :0])[:, :2].tanh())


@pytest.mark.parametrize("make", MAKES)
def test_actions_are_in_the_environments_units_and_bounds(make):
    policy = make(WIDE, SMALL)
    with torch.no_grad():
        policy.actor.layers[-1].weight.mul_(100)
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
        policy.actor.layers[-1].weight.zero_(), policy.actor.layers[-1].bias.zero_()
    actions = acted(policy, torch.randn(20_000, 3))
    torch.testing.assert_close(actions.mean(0), torch.tensor([-0.5, 3.0]), atol=0.01, rtol=0)
    torch.testing.assert_close(actions.std(0), torch.tensor([0.15, 0.2]), atol=0.005, rtol=0)


@pytest.mark.parametrize("make", MAKES)
def test_observations_are_standardised_where_that_is_asked_for(make):
    seen, x = 3 * torch.randn(100, 3) + 2, torch.randn(20, 3)
    policy, plain = make(WIDE, SMALL, normalize_observation=True), make(WIDE, SMALL)
    plain.actor.load_state_dict(policy.actor.state_dict())
    policy.update_statistics({"observation": seen}), plain.update_statistics({"observation": seen})
    expected = acted(plain, (x - seen.mean(0)) / seen.std(0, unbiased=False), ExplorationType.DETERMINISTIC)
    torch.testing.assert_close(acted(policy, x, ExplorationType.DETERMINISTIC), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize(
    ("spaces", "fault"),
    [
        (Spaces(observation=(3,), actions=4, discrete=True), "data.env has discrete actions"),
        (Spaces(observation=(3,), actions=2, discrete=False), "data.env has unbounded actions"),
        (Spaces((3,), 1, discrete=False, low=(-1.0,), high=(torch.inf,)), "data.env has unbounded actions"),
        (Spaces((3,), 2, discrete=False, low=(-1.0, 0.5), high=(1.0, 0.5)), r"from \[-1.0, 0.5\] to \[1.0, 0.5\]"),
    ],
)
def test_actions_without_bounds_are_refused(make, spaces, fault):
    with pytest.raises(RecipeError, match=fault):
        make(spaces, SMALL)


# --- Contexts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize(
    ("spaces", "context", "task"),
    [
        (TASKS, partial(TaskContext, normalize=False), torch.randn(20, 4)),
        (INDEX, OneHotContext, torch.randint(3, (20,))),
    ],
)
@torch.no_grad()
def test_actions_are_those_of_the_network_given_the_task(make, spaces, context, task):
    policy = make(spaces, partial(Hyper, hidden=[8], init="hyperfan_in"), context=context)
    for parameter in policy.actor.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    x, told = torch.randn(20, 3), task if task.ndim == 2 else torch.nn.functional.one_hot(task, 3).float()
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        chosen, state = policy.act({"observation": x, "task": task, "is_init": None}, None)
    raw = torch.stack([policy.actor(x[k], told[k]) for k in range(20)])[:, :2].tanh()
    torch.testing.assert_close(chosen["action"], policy.centre + policy.reach * raw, atol=1e-5, rtol=1e-5)
    assert state is None
    assert policy.told
    assert policy.in_keys == ["observation", "task"]


@pytest.mark.parametrize("make", MAKES)
@torch.no_grad()
def test_a_memory_is_carried_from_step_to_step_and_begins_afresh_with_an_episode(make):
    context = partial(RecurrentContext, encoder=partial(GRU, hidden=5))
    policy = make(WIDE, partial(Concat, hidden=[8]), context=context)
    steps, init = 6, torch.zeros(4, 6, 1, dtype=torch.bool)
    init[:, 0], init[2, 3] = True, True
    window = {
        "observation": torch.randn(4, steps, 3), "is_init": init, "previous_action": torch.randn(4, steps, 2),
        "previous_reward": torch.randn(4, steps, 1),
    }  # fmt: skip
    contexts, _ = policy.context({**window, "features": window["observation"]}, None)
    raw = policy.actor(window["observation"], contexts.values)[..., :2].tanh()
    tensordict = TensorDict({"context_state": torch.zeros(4, 5)}, [4])
    for t in range(steps):
        tensordict.update({key: entry[:, t] for key, entry in window.items()})
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            tensordict = policy(tensordict)
        torch.testing.assert_close(tensordict["action"], policy.centre + policy.reach * raw[:, t])


@torch.no_grad()
def test_the_context_is_embedded_and_the_observation_encoded_before_the_network():
    encoder, embedding = partial(VectorEncoder, widths=[6]), partial(VectorEncoder, widths=[5])
    policy = GaussianPolicy(TASKS, Concat, encoder=encoder, context=TaskContext, embedding=embedding)
    x, task = torch.randn(7, 3), torch.randn(7, 4)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        chosen, _ = policy.act({"observation": x, "task": task}, None)
    expected = policy.actor(policy.observation.encoder(x), policy.embedding(task))[:, :2].tanh()
    torch.testing.assert_close(chosen["action"], policy.centre + policy.reach * expected)


def test_an_embedding_of_nothing_is_refused():
    with pytest.raises(RecipeError, match=r"model\.embedding is given without model\.context"):
        GaussianPolicy(WIDE, SMALL, embedding=VectorEncoder)
