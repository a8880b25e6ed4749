from functools import partial

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence
from torch.nn import functional as F

from lightning_hyper.checks import RecipeError
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.modules import (
    CellRewardDecoder,
    JoinedContext,
    ObservationDecoder,
    OneHotContext,
    RewardDecoder,
    TaskDecoder,
    VariationalContext,
)
from lightning_hyper.modules.variational_context import step_divergence

SPACES = Spaces((2,), 4, True, horizon=6, trials=True, task=3)
LENGTHS = torch.tensor([6, 4, 2])


def trials(n=3, steps=6):
    reward = torch.randint(2, (n, steps, 1)).float()
    return {
        "observation": torch.randint(5, (n, steps, 2)).float(),
        "is_init": (torch.arange(steps) == 0).view(1, -1, 1).expand(n, -1, -1),
        "previous_action": torch.randint(4, (n, steps)),
        "previous_reward": reward,
        "episode_done": torch.zeros(n, steps, 1),
        "task": torch.randn(n, 1, 3).expand(-1, steps, -1),
    }


def made(*decoders, **options):
    return VariationalContext(SPACES, 2, decoders=list(decoders) or None, **options)


def test_the_divergence_is_that_of_neighbouring_normals():
    mean, log_variance = torch.randn(3, 5, 2), torch.randn(3, 5, 2)
    normals = [
        Independent(Normal(m, (0.5 * v).exp()), 1) for m, v in zip(mean.unbind(1), log_variance.unbind(1), strict=True)
    ]
    before = [Independent(Normal(torch.zeros(3, 2), torch.ones(3, 2)), 1), *normals[:-1]]
    expected = torch.stack([kl_divergence(now, then) for now, then in zip(normals, before, strict=True)], 1)
    torch.testing.assert_close(step_divergence(mean, log_variance), expected)


def by_hand(source, seen, lengths, error):
    """The objective's reconstruction by loops: each step's latent says every transition of its trial."""
    total = 0.0
    for row, n in enumerate(lengths.tolist()):
        for step in range(n):
            for k in range(1, n):
                total += error(row, step, k)
    return total / len(lengths)


@pytest.mark.parametrize("loss", ["mse", "bernoulli"])
def test_the_reward_of_every_transition_is_said_by_the_latent_of_every_step(monkeypatch, loss):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # the latent is the mean
    source, seen = made(partial(RewardDecoder, loss=loss), kl=0.0), trials()
    (decoder,) = source.decoders
    mean = super(VariationalContext, source).forward(seen, None)[0].values[..., :5]

    def error(row, step, k):
        x = decoder.state(seen["observation"][row, k]), decoder.state(seen["observation"][row, k - 1])
        action = decoder.action(F.one_hot(seen["previous_action"][row, k], 4).float())
        transition = torch.cat([*x, action])
        net = decoder.network
        hidden = torch.relu(net.of_latent(mean[row, step]) + net.of_transition(transition))
        said, wanted = net.head(net.layers(hidden)).squeeze(), seen["previous_reward"][row, k, 0]
        return (said - wanted).square() if loss == "mse" else F.binary_cross_entropy_with_logits(said, wanted)

    losses = source.objective(seen, LENGTHS)
    torch.testing.assert_close(losses["reward"], by_hand(source, seen, LENGTHS, error))
    assert losses["kl"] == 0
    torch.testing.assert_close(losses["total"], losses["reward"])


def test_cells_are_told_apart(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    source, seen = made(CellRewardDecoder, kl=0.0), trials()
    (decoder,) = source.decoders
    mean = super(VariationalContext, source).forward(seen, None)[0].values[..., :5]

    def error(row, step, k):
        x, y = seen["observation"][row, k].int().tolist()
        said = decoder.head(decoder.layers(mean[row, step]))[5 * x + y]
        return F.binary_cross_entropy_with_logits(said, seen["previous_reward"][row, k, 0])

    torch.testing.assert_close(source.objective(seen, LENGTHS)["cellreward"], by_hand(source, seen, LENGTHS, error))


@pytest.mark.parametrize("decoder", [RewardDecoder, CellRewardDecoder, ObservationDecoder, TaskDecoder])
def test_what_lies_behind_a_trials_end_does_not_count(decoder):
    source, seen = made(decoder), trials()
    other = {key: entry.clone() for key, entry in seen.items()}
    for row, n in enumerate(LENGTHS.tolist()):
        other["observation"][row, n:] = 3
        other["previous_reward"][row, n:] = 9
    values = []
    for given in (seen, other):
        torch.manual_seed(1)
        values.append(source.objective(given, LENGTHS)["total"])
    torch.testing.assert_close(*values)
    assert values[0] > 0


def test_summed_kl_is_the_mean_times_the_trials():
    values = []
    for summed in (False, True):
        torch.manual_seed(0)
        source = made(CellRewardDecoder, kl=0.5, summed_kl=summed)
        torch.manual_seed(1)
        values.append(source.objective(trials(), LENGTHS)["kl"])
    torch.testing.assert_close(values[1], 3 * values[0])


def test_the_context_gets_no_gradient_and_the_objective_reaches_every_parameter():
    source = made(RewardDecoder, ObservationDecoder, TaskDecoder)
    contexts, state = source(trials(), None)
    assert contexts.values.shape == (3, 6, 10)
    assert not contexts.values.requires_grad
    assert state.shape == (3, source.state_features)
    source.objective(trials(), LENGTHS)["total"].backward()
    idle = {name for name, p in source.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert not idle


def test_contexts_are_standardised_by_what_was_collected():
    source, window = made(CellRewardDecoder), trials(n=50)
    source.update_statistics({**window, "context_state": torch.zeros(50, source.state_features)})
    values = source(window, None)[0].values
    torch.testing.assert_close(values.mean((0, 1)), torch.zeros(10), atol=1e-4, rtol=0)
    torch.testing.assert_close(values.std((0, 1), correction=0), torch.ones(10), atol=1e-2, rtol=0)


def test_it_is_one_of_several_sources():
    spaces = Spaces((2,), 4, True, trials=True, tasks=("a", "b"), missions=(("m",), ("n",)))
    joined = JoinedContext(spaces, 2, parts=[OneHotContext, partial(VariationalContext, decoders=[CellRewardDecoder])])
    assert joined.inferred is joined.parts[1]
    window = {**trials(), "task": torch.zeros(3, 6, dtype=torch.int64)}
    joined.update_statistics({**window, "context_state": torch.zeros(3, joined.state_features)})
    assert joined.parts[1].norm.count > 0


@pytest.mark.parametrize(
    ("spaces", "options", "fault"),
    [
        (Spaces((2, 2, 3), 4, True), {}, "image"),
        (SPACES, {"decoders": []}, "empty list"),
        (SPACES, {"capacity": 3}, "capacity is 3"),
        (Spaces((2,), 4, True), {"decoders": [TaskDecoder]}, "shows no task"),
        (Spaces((3,), 4, True), {"decoders": [CellRewardDecoder]}, r"\(x, y\)"),
    ],
)
def test_what_has_no_meaning_is_refused(spaces, options, fault):
    with pytest.raises(RecipeError, match=fault):
        VariationalContext(spaces, 2, **options)
