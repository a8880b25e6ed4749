"""True action gradients against closed forms, and a callback that leaves training as it is."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from mlflow import MlflowClient

from lightning_hyper.algorithms import PPO, SAC, TD3
from lightning_hyper.analysis.gradient_similarity import GradientSimilarity
from lightning_hyper.analysis.gradients import (
    States,
    critic_action_gradient,
    gradient_similarity,
    sample_states,
    slope,
    true_action_gradient,
    update_variance,
)
from lightning_hyper.envs import BatchedEnv, HalfCheetah, Pendulum
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.experience import Replay, Rollouts
from lightning_hyper.experiment import main
from lightning_hyper.modules import RecurrentContext
from lightning_hyper.modules.critic import TwinCritic
from lightning_hyper.modules.policies import DeterministicPolicy
from lightning_hyper.nn import GRU, MLP, Concat

GAMMA = 0.9


class Linear(BatchedEnv):
    """s' = s + B a; reward -|s'|^2 - c |a|^2 + noise; terminates where s' leaves a ball."""

    B = torch.tensor([[0.5, 0.1], [0.0, 0.3]])
    COST, noise, radius = 0.2, 0.0, 100.0
    simulates, horizon = True, 50

    def __init__(self, num_envs=1, *, device="cpu"):
        super().__init__(num_envs, device)
        self.state = torch.zeros(num_envs, 2)
        self._make_specs((2,), (torch.full((2,), -2.0), torch.full((2,), 2.0)))

    def start(self, rows):
        drawn = 0.3 * torch.randn(len(rows), 2, generator=self.generator)
        self.state = torch.where(rows.unsqueeze(1), drawn, self.state)

    def observation(self):
        return self.state

    def simulate(self, action):
        self.state = self.state + action @ self.B.T
        reward = -self.state.square().sum(1) - self.COST * action.square().sum(1)
        reward = reward + self.noise * torch.randn(len(reward), generator=self.generator)
        return self.state, reward, self.state.norm(dim=1) > self.radius

    def snapshot(self):
        return {"state": self.state.clone()}

    def restore(self, state):
        self.state = state["state"].clone()


class Proportional(DeterministicPolicy):
    """a = -K s, in units of the environment, whose half range is 2."""

    K = 0.5

    def mode(self, x, contexts):
        return (-self.K * x / 2).clamp(-1, 1)


def policy_of(env, cls=Proportional, **options):
    return cls(Spaces.of(env), partial(MLP, hidden=[4]), noise=0.3, **options)


def exact_gradient(state, scaled, horizon):
    """d/da of the discounted return, by automatic differentiation of the closed loop."""
    scaled = scaled.double().requires_grad_()
    state, action, total = state.double(), 2 * scaled, 0.0
    for frame in range(horizon):
        state = state + action @ Linear.B.double().T
        total = total + GAMMA**frame * (-state.square().sum() - Linear.COST * action.square().sum())
        action = -Proportional.K * state
    return torch.autograd.grad(total, scaled)[0]


def estimate(count=6, *, noise=0.0, rollouts=40, horizon=5, sigma=0.01, scaled=None, radius=100.0, turns=1):
    env = Linear(2 * rollouts * (count // turns))
    env.noise, env.radius = noise, radius
    explored = Linear(count)
    explored.set_seed(1)
    explored.begin()
    states = States(explored.save_state())
    generator = torch.Generator().manual_seed(1)
    scaled = (0.3 * torch.randn(count, 2, generator=generator)).clamp(-0.9, 0.9) if scaled is None else scaled
    options = {"rollouts": rollouts, "horizon": horizon, "sigma": sigma, "gamma": GAMMA, "generator": generator}
    return states, scaled, *true_action_gradient(env, policy_of(env), states, scaled, **options)


def test_the_true_gradient_is_that_of_the_closed_form():
    states, scaled, true, halves = estimate()
    exact = exact_gradient(states.shown["observation"], scaled, 5)
    torch.testing.assert_close(true, exact, rtol=0.02, atol=0.02)
    torch.testing.assert_close(halves.mean(0), exact, rtol=0.02, atol=0.02)


def test_states_that_take_turns_give_the_same():
    _, _, together, halves = estimate()
    _, _, in_turns, halves_in_turns = estimate(turns=3)
    torch.testing.assert_close(in_turns, together)
    torch.testing.assert_close(halves_in_turns, halves)


def test_rewards_after_a_termination_do_not_count():
    states, scaled, true, _ = estimate(radius=0.0)  # the first frame always ends the episode
    exact = exact_gradient(states.shown["observation"], scaled, 1)
    torch.testing.assert_close(true, exact, rtol=0.02, atol=0.02)


def test_perturbations_that_the_bounds_cut_are_counted_as_they_were_made():
    corner = torch.ones(6, 2)
    states, _, true, _ = estimate(scaled=corner)
    # As if they were whole, slopes would be half as large.
    exact = exact_gradient(states.shown["observation"], corner, 5)
    torch.testing.assert_close(true, exact, rtol=0.05, atol=0.05)


def test_two_estimates_agree_where_returns_are_smooth_and_not_where_they_are_noise():
    def reliability(**options):
        _, _, true, halves = estimate(100, rollouts=10, horizon=3, **options)
        return gradient_similarity(true, true, halves)

    smooth, noise = reliability(), reliability(noise=1000.0)
    assert smooth["reliability"] > 0.99
    assert smooth["vanishing"] < 0.1
    assert abs(noise["reliability"]) < 0.25  # mean of 100 cosines of standard deviation 0.71
    assert noise["vanishing"] > 0.6


def test_too_few_rollouts_and_an_environment_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"rollouts is 2; .* at least 3"):
        estimate(rollouts=2)
    env, explored = Linear(3), Linear(2)
    explored.begin()
    states = States(explored.save_state())
    with pytest.raises(ValueError, match="num_envs is 3; 2 states need 60"):
        true_action_gradient(env, policy_of(env), states, torch.zeros(2, 2), gamma=0.9, generator=torch.Generator())


def test_the_fit_is_numpys():
    x, y = torch.randn(3, 15, 4, dtype=torch.float64), torch.randn(3, 15, dtype=torch.float64)
    design = np.concatenate([x.numpy(), np.ones((3, 15, 1))], -1)
    expected = [np.linalg.lstsq(a, b, rcond=None)[0][:-1] for a, b in zip(design, y.numpy(), strict=True)]
    np.testing.assert_allclose(slope(x, y), np.stack(expected), rtol=1e-9)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_critic_that_knows_the_gradient_has_cosine_one_and_its_opposite_minus_one(sign):
    states, scaled, true, halves = estimate()
    starts = states.shown["observation"]
    exact = torch.stack([exact_gradient(s, a, 5) for s, a in zip(starts, scaled, strict=True)])

    class Known:
        def value(self, window, action, task=None):
            assert window["observation"].shape == action.shape == (6, 2)
            return sign * (exact * action).sum(-1) + window["observation"].sum(-1)

    of_critic = critic_action_gradient(Known(), policy_of(Linear()), states, scaled)
    torch.testing.assert_close(of_critic.double(), sign * exact, rtol=1e-5, atol=1e-6)
    assert gradient_similarity(of_critic, true, halves)["cosine"] == pytest.approx(sign, abs=0.01)


def test_update_variance_is_that_of_a_hand_computation():
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    # Of 0.5 (w . x)^2 the gradient is (w . x) x.
    minibatches = [torch.tensor(x) for x in ([1.0, 0.0], [0.0, 1.0], [1.0, -1.0])]
    gradients = np.array([[1.0, 0.0], [0.0, -2.0], [3.0, -3.0]])
    mean = gradients.mean(0)
    expected = ((gradients - mean) ** 2).sum(1).mean() / (mean**2).sum()
    with torch.inference_mode():  # as in a validation
        assert update_variance(lambda x: 0.5 * (w @ x).square(), [w], minibatches) == pytest.approx(expected)
    assert w.grad is None


def test_a_critic_that_is_told_a_context_is_told_that_of_the_states():
    env = Linear(4)
    policy = policy_of(env, DeterministicPolicy, context=partial(RecurrentContext, encoder=partial(GRU, hidden=3)))
    critics = TwinCritic(Spaces.of(env), partial(Concat, hidden=[8]), context=["task"], task_features=3)
    states = sample_states(env, policy, within=6, generator=torch.Generator().manual_seed(0))
    actions = torch.zeros(4, 2)
    given = []

    class Spy:
        def value(self, window, action, task=None):
            given.append(task.each())
            return critics.value(window, action, task)

    gradient = critic_action_gradient(Spy(), policy, states, actions)
    step = {key: entry.unsqueeze(1) for key, entry in states.shown.items()}
    with torch.no_grad():
        contexts, _ = policy.context({**step, "features": step["observation"]}, states.context_state)
    torch.testing.assert_close(given[0], contexts.each().squeeze(1))
    assert states.context_state.abs().sum(1).count_nonzero() >= 2  # of those that are not at their beginning
    assert gradient.abs().sum() > 0


def test_a_policy_with_a_memory_goes_on_from_what_it_remembered():
    class Remembering(DeterministicPolicy):
        """Acts by how many steps its memory has seen."""

        state_features = 1

        def act(self, step, state):
            fresh = step["is_init"].float()
            state = 1.0 - fresh if state is None else state * (1 - fresh)
            return {"action": -0.1 * state.expand(-1, 2)}, state + 1

    env = Linear(6)
    policy = policy_of(env, Remembering)
    states = sample_states(env, policy, within=5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(states.context_state, states.shown["step_count"].float())
    branched = Linear(6 * 40)
    options = {"rollouts": 20, "horizon": 3, "sigma": 0.01, "gamma": GAMMA}
    scaled = torch.full((6, 2), 0.2)
    true, _ = true_action_gradient(branched, policy, states, scaled, generator=torch.Generator(), **options)
    for row in range(6):
        leaf = scaled[row].double().requires_grad_()
        state, action, total = states.shown["observation"][row].double(), 2 * leaf, 0.0
        for frame in range(3):
            state = state + action @ Linear.B.double().T
            total = total + GAMMA**frame * (-state.square().sum() - Linear.COST * action.square().sum())
            action = torch.full((2,), -0.1, dtype=torch.float64) * (states.context_state[row] + frame + 1)
        torch.testing.assert_close(true[row], torch.autograd.grad(total, leaf)[0], rtol=0.02, atol=0.02)


def test_sampled_states_are_where_the_observations_were_made():
    env = HalfCheetah(5)
    policy = policy_of(env, DeterministicPolicy)
    before = torch.get_rng_state()
    states = sample_states(env, policy, within=8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    twice = HalfCheetah(10)
    twice.load_state(states.repeated(2).simulator)
    expected = states.shown["observation"].repeat_interleave(2, 0)
    torch.testing.assert_close(twice.observation(), expected, rtol=0, atol=0)
    torch.testing.assert_close(twice.current["observation"], expected, rtol=0, atol=0)
    frames = states.shown["step_count"].squeeze(1)
    assert len(frames.unique()) > 1
    assert frames.max() < 8


class Generators(Callback):
    def on_train_batch_end(self, *_):
        self.torch, self.numpy = torch.get_rng_state(), np.random.get_state()[1].copy()


def train(fit, callbacks, algorithm=TD3, env=Pendulum, sequence=1, **options):
    model = algorithm(actor=partial(MLP, hidden=[16]), critic=partial(Concat, hidden=[16]), **options)
    sizes = {"batch_size": 16, "capacity": 500, "warmup_frames": 40, "eval_envs": 2, "sequence": sequence}
    data = Replay(partial(env, num_envs=2), steps=5, evaluate_every=None, **sizes)
    generators = Generators()
    fit(model, data, [*callbacks, generators], 200)
    return model, generators


def similarity(**options):
    return GradientSimilarity(
        **{"every": 50, "states": 3, "rollouts": 4, "horizon": 3, "within": 5, "minibatches": 3, **options}
    )


MEMORY = {"context": partial(RecurrentContext, encoder=partial(GRU, hidden=4)), "critic_context": ["task"]}


@pytest.mark.parametrize(
    ("algorithm", "protocol", "options"),
    [(TD3, "paper", {}), (SAC, "offset", {}), (SAC, "offset", {**MEMORY, "sequence": 4})],
)
def test_training_is_bit_identical_with_and_without(fit, tmp_path, algorithm, protocol, options):
    watching = similarity(protocol=protocol)
    with_it, generators_with = train(fit, [watching], algorithm, **options)
    without, generators_without = train(fit, [], algorithm, **options)
    for name, tensor in without.state_dict().items():
        torch.testing.assert_close(with_it.state_dict()[name], tensor, rtol=0, atol=0)
    assert torch.equal(generators_with.torch, generators_without.torch)
    assert (generators_with.numpy == generators_without.numpy).all()
    assert [row["frames"] for row in watching.rows] == [50, 100, 150, 200]
    for row in watching.rows:
        assert {*row} == {"frames", "cosine", "reliability", "vanishing", "update_variance"}
        assert all(np.isfinite(list(row.values())))
        assert row["update_variance"] > 0
    assert (tmp_path / "gradient.png").stat().st_size > 5000


def test_a_measurement_depends_on_the_frame_and_the_model_alone(fit):
    one, other = similarity(), similarity(every=150)
    train(fit, [one])
    train(fit, [other])
    assert other.rows == [row for row in one.rows if row["frames"] == 150]
    resumed = similarity()
    resumed.load_state_dict(one.state_dict())
    assert resumed.rows == one.rows


def test_nothing_is_measured_before_anything_is_learned(fit):
    watching = similarity(every=10)
    train(fit, [watching])
    assert [row["frames"] for row in watching.rows] == list(range(50, 201, 10))


def test_the_picture_has_a_curve_for_each():
    rows = [{"frames": k, "cosine": 0.1 * k, "reliability": 0.9} for k in range(5)]
    watching = similarity()
    watching.load_state_dict({"rows": rows})
    (axes,) = watching.draw(None).axes
    drawn = [line.get_ydata() for line in axes.lines if len(line.get_ydata()) == 5]
    np.testing.assert_allclose(drawn, [[0, 0.1, 0.2, 0.3, 0.4], [0.9] * 5])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": 0}, "trainer.callbacks GradientSimilarity.every is 0"),
        ({"sigma": 0.0}, "GradientSimilarity.sigma is 0"),
        ({"protocol": "best"}, "GradientSimilarity.protocol is 'best'"),
    ],
)
def test_numbers_out_of_range_name_the_key(options, said):
    with pytest.raises(ValueError, match=said):
        GradientSimilarity(**options)


RECIPE = {
    "experiment": "tiny",
    "frames": 100,
    "trainer": {
        "accelerator": "cpu",
        "callbacks": [
            {
                "class_path": "GradientSimilarity",
                "init_args": {"every": 50, "states": 15, "rollouts": 4, "horizon": 3, "within": 5, **options},
            }
            for options in ({}, {"name": "at_policy", "protocol": "paper"})
        ],
    },
    "data": {
        "class_path": "Replay",
        "init_args": {
            "env": {"class_path": "Pendulum", "init_args": {"num_envs": 2}},
            "evaluate_every": 50,
            "steps": 5,
            "batch_size": 16,
            "warmup_frames": 20,
            "eval_envs": 2,
        },
    },
    "model": {
        "class_path": "TD3",
        "init_args": {
            "actor": {"class_path": "MLP", "init_args": {"hidden": [8]}},
            "critic": {"class_path": "Concat", "init_args": {"hidden": [8]}},
        },
    },
}


def test_a_recipe_names_it_and_mlflow_has_its_metrics_and_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("watched.yaml").write_text(yaml.safe_dump(RECIPE))
    assert main(["fit", "-c", "watched.yaml", "--run", "a"]) == 0
    client = MlflowClient(f"sqlite:///{Path('runs/mlflow.db').resolve()}")
    (run,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    for name in ("gradient", "at_policy"):
        points = client.get_metric_history(run.info.run_id, f"{name}/cosine")
        assert [point.step for point in points] == [50, 100]
        assert f"{name}/reliability" in run.data.metrics
    assert run.data.metrics["gradient/cosine"] != run.data.metrics["at_policy/cosine"]
    pictures = {file.path for file in client.list_artifacts(run.info.run_id, "pictures")}
    assert pictures == {"pictures/gradient.png", "pictures/at_policy.png"}


def test_models_environments_and_fits_that_cannot_be_measured_are_named(fit):
    with pytest.raises(ValueError, match=r"trainer\.callbacks GradientSimilarity: model PPO has no Q-function"):
        fit(PPO(), Rollouts(partial(Pendulum, num_envs=4)), [similarity()], 100)
    with pytest.raises(ValueError, match=r"GradientSimilarity\.rollouts is 1; .* at least 2"):
        train(fit, [similarity(rollouts=1)])

    class Closed(Pendulum):
        simulates = False

    with pytest.raises(ValueError, match=r"trainer\.callbacks GradientSimilarity: data\.env Closed"):
        train(fit, [similarity()], env=Closed)
