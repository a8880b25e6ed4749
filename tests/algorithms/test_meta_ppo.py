"""MetaPPO learns from one collected batch what the formulas say."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from lightning_hyper.algorithms import MetaPPO
from lightning_hyper.algorithms.base import episode_returns
from lightning_hyper.envs import GridNavi
from lightning_hyper.experience.rollouts import Rollouts
from lightning_hyper.modules import RecurrentContext, Spaces
from lightning_hyper.nn import GRU, Concat, Hyper
from lightning_hyper.objectives import PPOLoss


class Alone:
    """Optimiser and backward without a trainer, so that one batch can be looked at by itself."""

    def attach(self, model):
        model._optimizer = model.configure_optimizers()
        model.optimizers = lambda use_pl_optimizer=True: model._optimizer
        model.manual_backward = lambda loss: loss.backward()
        model._trainer = SimpleNamespace(world_size=1)


def algorithm(env, network=Hyper, **options):
    context = options.pop("context", partial(RecurrentContext, encoder=partial(GRU, hidden=8), code=None))
    model = MetaPPO(context=context, actor=partial(network, hidden=[6]), critic=partial(network, hidden=[6]), **options)
    torch.manual_seed(1)
    model.build(Spaces.of(env))
    Alone().attach(model)
    return model


def collected(env, model, steps):
    return Rollouts(env, model.policy, steps, 1).collect()


def advantages_by_hand(reward, value, next_value, done, terminated, gamma, lam):
    out = torch.zeros_like(reward)
    for n in range(len(reward)):
        running = 0.0
        for t in reversed(range(reward.shape[1])):
            delta = reward[n, t] + gamma * next_value[n, t] * (1 - terminated[n, t].float()) - value[n, t]
            running = delta + gamma * lam * (1 - done[n, t].float()) * running
            out[n, t] = running
    return out


@pytest.mark.parametrize("truncated", [False, True])
def test_truncation_bootstraps_from_the_final_observation_and_termination_does_not(truncated):
    env = GridNavi(4, episodes=2, episode_steps=3)
    model = algorithm(env, normalize_reward=False, normalize_advantage=None)
    batch = collected(env, model, 10)  # a trial ends within, another is cut
    if truncated:
        batch["next", "terminated"][:] = False
    done, terminated = batch["next", "done"], batch["next", "terminated"]
    next_value = torch.zeros(4, 10, 1)
    with torch.no_grad():
        for t in range(10):
            now = {k: batch["next", k][:, t : t + 1] for k in model.policy.in_keys}
            c, _ = model.agent.contexts(now, batch["next", "hidden"][:, t])
            next_value[:, t : t + 1] = model.agent.value(model.agent.inputs(now), c)
    expected = advantages_by_hand(
        batch["next", "reward"], batch["state_value"], next_value, done, terminated, model.gamma, model.gae_lambda
    )
    data = model.estimate(batch)
    torch.testing.assert_close(data["advantage"], expected.squeeze(-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(data["target"], (expected + batch["state_value"]).squeeze(-1), atol=1e-5, rtol=1e-4)


def test_encoding_a_batch_again_gives_the_log_probabilities_and_values_of_acting():
    env = GridNavi(4, episodes=2, episode_steps=3)
    model = algorithm(env)
    rollouts = Rollouts(env, model.policy, 4, 1)
    rollouts.collect()
    batch = rollouts.collect()  # begins within a trial: the hidden state was carried
    assert not batch["is_init"][:, 0].any()
    x = model.agent.inputs(batch)
    c, _ = model.agent.contexts(batch, batch["hidden"])
    torch.testing.assert_close(model.agent.policy(x, c).log_prob(batch["action"]), batch["log_prob"])
    torch.testing.assert_close(model.agent.value(x, c), batch["state_value"])


def test_first_update_sees_ratio_one():
    env = GridNavi(8)
    model = algorithm(env)
    first = model.learn(collected(env, model, 60))[0]
    assert first["kl"].abs().item() < 1e-6
    assert first["clipped"].item() == 0


def test_statistics_change_only_after_the_updates_and_then_with_the_batch():
    env = GridNavi(8)
    model = algorithm(env)
    batch = collected(env, model, 60)
    model.learn(batch)
    seen = torch.cat([batch["observation"], batch["episode_done"]], -1).flatten(0, 1).double()
    torch.testing.assert_close(model.agent.norm.mean, seen.mean(0))


def test_advantages_are_standardised():
    env = GridNavi(8)
    model = algorithm(env)
    advantage = model.estimate(collected(env, model, 60))["advantage"]
    assert advantage.mean().abs().item() < 1e-5
    assert advantage.std(unbiased=False).item() == pytest.approx(1, abs=1e-3)


def state_after(env, batch, **options):
    model = algorithm(env, epochs=1, **options)
    torch.manual_seed(2)
    model.learn(batch.clone())
    return {k: v.clone() for k, v in model.agent.named_parameters()}


def test_with_one_minibatch_it_does_not_matter_what_a_minibatch_is_a_part_of():
    env = GridNavi(8, episodes=2, episode_steps=5)
    batch = collected(env, algorithm(env), 10)
    trials = state_after(env, batch, minibatches=1, partition="trials")
    steps = state_after(env, batch, minibatches=1, partition="steps")
    for key, value in trials.items():
        torch.testing.assert_close(value, steps[key], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("partition", ["trials", "steps"])
def test_encoding_once_an_epoch_steps_the_context_on_the_gradients_that_its_contexts_gathered(partition):
    env = GridNavi(8, episodes=2, episode_steps=5)
    batch = collected(env, algorithm(env), 10)
    # With one minibatch gathering is exact: the same step as encoding again, group by group.
    options = {"minibatches": 1, "partition": partition}
    once = state_after(env, batch, reencode="epoch", **options)
    again = state_after(env, batch, reencode="minibatch", **options)
    for key, value in again.items():
        torch.testing.assert_close(value, once[key], atol=1e-6, rtol=1e-5)


def test_encoding_once_an_epoch_takes_one_step_of_the_context_for_all_minibatches():
    env = GridNavi(8)
    model = algorithm(env, reencode="epoch", epochs=1, minibatches=4)
    model.learn(collected(env, model, 60))
    steps = {g["name"]: model._optimizer.state[g["params"][0]]["step"].item() for g in model._optimizer.param_groups}
    assert steps == {"heads": 4, "context": 1}


def test_bptt_cuts_the_gradient_through_time_and_nothing_else():
    env = GridNavi(4)
    model = algorithm(env)
    batch = collected(env, model, 60)
    x, _ = model.agent.contexts(batch, batch["hidden"])
    y, _ = model.agent.contexts(batch, batch["hidden"], 15)
    torch.testing.assert_close(x, y)

    def reach(bptt):
        reward = batch["previous_reward"].clone().requires_grad_()
        c, _ = model.agent.contexts(
            {**{k: batch[k] for k in model.policy.in_keys}, "previous_reward": reward}, batch["hidden"], bptt
        )
        c[:, 59].sum().backward()
        return reward.grad.abs().sum((0, 2)).nonzero().min().item()

    assert reach(None) <= 1
    assert reach(15) == 45


def test_compiled_updates_equal_eager_ones():
    env = GridNavi(8, episodes=2, episode_steps=5)
    batch = collected(env, algorithm(env), 10)
    eager, compiled = state_after(env, batch), state_after(env, batch, compile=True)
    for key, value in eager.items():
        torch.testing.assert_close(value, compiled[key], atol=1e-5, rtol=1e-4)


def test_learning_rate_decays_linearly_to_zero_over_the_budget():
    env = GridNavi(4)
    model = algorithm(env, lr=1e-2, context_lr=1e-3, lr_schedule="linear")
    model.clock.budget = 100
    rates = []
    for frames in (0, 50, 100):
        model.clock.frames = frames
        model._schedule_learning_rate()
        rates.append([g["lr"] for g in model._optimizer.param_groups])
    assert rates == [[1e-2, 1e-3], [5e-3, 5e-4], [0, 0]]


def test_gradient_norm_is_clipped_group_by_group():
    env = GridNavi(4)
    model = algorithm(env, max_grad_norm=1e-3)
    loss = 1e3 * sum(p.sum() for p in model.agent.parameters())
    norms = model.update(loss)
    assert min(v.item() for v in norms.values()) > 1
    for group in model._optimizer.param_groups:
        grads = torch.cat([p.grad.flatten() for p in group["params"]])
        assert grads.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_episode_returns_count_whole_trials_alone():
    reward = torch.arange(8.0).view(1, 8, 1)
    is_init, done = torch.zeros(1, 8, 1, dtype=torch.bool), torch.zeros(1, 8, 1, dtype=torch.bool)
    is_init[0, 1], done[0, 0], done[0, 4], is_init[0, 5] = True, True, True, True
    episode = torch.tensor([1, 0, 0, 1, 1, 0, 0, 1]).view(1, 8, 1)
    batch = TensorDict(
        {"episode": episode, "is_init": is_init, "next": {"reward": reward, "done": done}}, batch_size=[1]
    )
    out = {k: v.item() for k, v in episode_returns(batch, "x").items()}
    assert out == {"x/return": 10, "x/episode_1": 3, "x/episode_2": 7}


def test_two_methods_differ_by_their_conditional_network_alone():
    env = GridNavi(4)
    hyper, concat = algorithm(env), algorithm(env, Concat)
    assert type(hyper.agent.context) is type(concat.agent.context)
    assert isinstance(hyper.agent.actor, Hyper)
    assert isinstance(concat.agent.actor, Concat)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"minibatches": 3}, "model.minibatches is 3"),
        ({"bptt": 61}, "model.bptt is 61"),
        ({"lr": 0.0}, "model.lr"),
        ({"gamma": 1.5}, "model.gamma"),
        ({"lr_schedule": "cosine"}, "model.lr_schedule"),
        ({"max_grad_norm": -1.0}, "model.max_grad_norm"),
        ({"loss": PPOLoss, "epochs": 0}, "model.epochs"),
    ],
)
def test_impossible_options_name_the_key(options, key):
    env = GridNavi(4)
    with pytest.raises(ValueError, match=key):
        algorithm(env, **{**options, **({"loss": PPOLoss()} if "loss" in options else {})}).check(4, 60)
