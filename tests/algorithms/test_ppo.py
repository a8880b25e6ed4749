"""Every update of PPO on a collected batch is the one that the formulas give."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from lightning_hyper.algorithms import PPO
from lightning_hyper.checks import RecipeError
from lightning_hyper.envs import GridNavi, Gym, MiniGrid, Pendulum, Trials
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.experience import Rollouts
from lightning_hyper.modules import OneHotContext, RecurrentContext, TaskContext
from lightning_hyper.nn import GRU, MLP, Concat, FiLM, GridEncoder, Hyper, VectorEncoder
from lightning_hyper.objectives import PPOLoss
from lightning_hyper.training.run import Run

CARTPOLE = partial(Gym, "CartPole-v1", num_envs=4, arguments={"max_episode_steps": 11})
PENDULUM = partial(Pendulum, num_envs=4, episode_steps=5)
TRIALS = partial(Trials, partial(GridNavi, episode_steps=5), num_envs=8)  # which batches cut
MINIGRID = partial(MiniGrid, num_envs=4, tasks=["MiniGrid-Empty-5x5-v0", "MiniGrid-LavaGapS5-v0"], levels=4)
MEMORY = partial(RecurrentContext, encoder=partial(GRU, hidden=6), code=2)
HEADS = {"actor": partial(Concat, hidden=[6]), "critic": partial(Concat, hidden=[6])}
LOSS = partial(PPOLoss, entropy=0.02, value=0.7)


def learner(env=CARTPOLE, *, steps=12, batches=2, **options):
    """PPO with rather large random weights, and the batch that it is about to learn from."""
    data = Rollouts(env, steps=steps)
    data.connect(seed=4)
    model = PPO(**{**HEADS, "loss": LOSS(), "lr": 1e-3, "epochs": 2, "minibatches": 2, **options})
    torch.manual_seed(1)
    model.build(Spaces.of(data.env))
    model.check(data.env.batch_size.numel(), steps)
    for parameter in model.agent.parameters():
        nn.init.normal_(parameter, std=0.4)
    data.begin(model.policy)
    batch = None
    for _ in range(batches):  # the last begins in the middle of episodes
        batch = data.collect()
    return model, batch


class ByHand:
    """PPO from its formulas: stepped in time, advantages by loops, Adam and clipping by hand."""

    def __init__(self, model):
        self.model, self.agent = model, copy.deepcopy(model.agent)
        context = self.agent.context
        apart = context is not None and (context.state_features or model.context_lr or model.context_adam_eps)
        inside = {id(p) for p in context.parameters()} if apart else set()
        parameters = list(self.agent.parameters())
        self.groups = [
            ([p for p in parameters if id(p) not in inside], model.lr, model.adam_eps),
            ([p for p in parameters if id(p) in inside], model.context_lr or model.lr,
             model.context_adam_eps or model.adam_eps),
        ]  # fmt: skip
        self.moments = {id(p): (torch.zeros_like(p), torch.zeros_like(p)) for p in parameters}
        self.count = 0

    def at(self, entries, t, state):
        """Encoded observation, context `[n, ...]` of one step, and the state after it."""
        window = {key: entries[key][:, t : t + 1] for key in self.agent.window_keys}
        x, contexts, state = self.agent.encode(window, state)
        return x[:, 0], contexts.each()[:, 0], state

    def heads(self, x, c):
        if self.agent.decision is not None:
            x = self.agent.decision(x, c)
        return self.agent.actor(x, c), self.agent.critic(x, c)[:, 0]

    def stepped(self, batch):
        """Outputs of actor and critic of each step, and the critic's value of what each step led to; `[n, T, ...]`."""
        state, now, after = batch.get("context_state", None), [], []
        for t in range(batch["action"].shape[1]):
            x, c, state = self.at(batch, t, state)
            now.append(self.heads(x, c))
            with torch.no_grad():
                x, c, _ = self.at(batch["next"], t, state)
                after.append(self.heads(x, c)[1])
        return torch.stack([o for o, _ in now], 1), torch.stack([v for _, v in now], 1), torch.stack(after, 1)

    def log_prob_and_entropy(self, out, action):
        if self.agent.log_std is None:
            log_p = out - out.exp().sum(-1, keepdim=True).log()
            return log_p.gather(-1, action.unsqueeze(-1))[..., 0], -(log_p.exp() * log_p).sum(-1)
        log_std = self.agent.log_std
        z = (action - out) / log_std.exp()
        constant = 0.5 * math.log(2 * math.pi)
        entropy = (log_std + constant + 0.5).sum().expand(out.shape[:-1])
        return (-0.5 * z.square() - log_std - constant).sum(-1), entropy

    def advantages(self, batch):
        model, after = self.model, batch["next"]
        reward, done, terminated = (after[key][..., 0].numpy() for key in ("reward", "done", "terminated"))
        if model.return_scale is not None:
            reward = self.scaled(reward, done)
        with torch.no_grad():
            _, value, following = (x.numpy() for x in self.stepped(batch))
        ended = terminated if model.bootstrap_truncation else done
        advantage = np.zeros_like(reward)
        for n in range(len(reward)):
            running = 0.0
            for t in reversed(range(reward.shape[1])):
                delta = reward[n, t] + model.gamma * following[n, t] * (not ended[n, t]) - value[n, t]
                running = delta + model.gamma * model.gae_lambda * (not done[n, t]) * running
                advantage[n, t] = running
        return torch.from_numpy(advantage), torch.from_numpy(advantage + value)

    def scaled(self, reward, done):
        returns = np.zeros_like(reward, dtype=np.float64)
        for n in range(len(reward)):
            running = 0.0
            for t in range(reward.shape[1]):
                returns[n, t] = running = self.model.gamma * running + reward[n, t]
                running = 0.0 if done[n, t] else running
        return np.clip(reward / np.sqrt(returns.var() + 1e-8), -10, 10).astype(np.float32)

    def learn(self, batch):
        model = self.model
        advantage, target = self.advantages(batch)
        if model.normalize_advantage == "batch":
            advantage = (advantage - advantage.mean()) / (advantage.std(unbiased=False) + 1e-5)
        n, steps = advantage.shape
        for _ in range(model.epochs):
            order = torch.randperm(n if model.partition == "windows" else n * steps)
            for part in order.chunk(model.minibatches):
                rows = torch.zeros(n, steps, dtype=torch.bool)
                (rows if model.partition == "windows" else rows.view(-1))[part] = True
                self.step(self.loss(batch, advantage, target, rows))

    def loss(self, batch, advantage, target, rows):
        out, value, _ = self.stepped(batch)
        log_prob, entropy = self.log_prob_and_entropy(out[rows], batch["action"][rows])
        a, weights = advantage[rows], self.model.loss
        if self.model.normalize_advantage == "minibatch":
            a = (a - a.mean()) / (a.std(unbiased=False) + 1e-5)
        ratio = (log_prob - batch["log_prob"][rows]).exp()
        surrogate = torch.min(ratio * a, ratio.clamp(1 - weights.clip, 1 + weights.clip) * a).mean()
        error = 0.5 * (value[rows] - target[rows]).square().mean()
        return -surrogate + weights.value * error - weights.entropy * entropy.mean()

    def step(self, loss):
        """Adam, after each group's gradient is clipped."""
        self.count += 1
        parameters = [p for group, _, _ in self.groups for p in group]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients = {id(p): g for p, g in zip(parameters, found, strict=True) if g is not None}
        for group, lr, eps in self.groups:
            norm = sum(gradients[id(p)].square().sum() for p in group if id(p) in gradients)
            limit = self.model.max_grad_norm
            scale = 1.0 if limit is None or not group else min(1.0, limit / (norm.sqrt().item() + 1e-6))
            for p in group:
                if id(p) not in gradients:
                    continue
                g, (m, v) = gradients[id(p)] * scale, self.moments[id(p)]
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                m_hat, v_hat = m / (1 - 0.9**self.count), v / (1 - 0.999**self.count)
                with torch.no_grad():
                    p.sub_(lr * m_hat / (v_hat.sqrt() + eps))


def assert_same_updates(model, batch):
    reference = ByHand(model)
    before = [p.detach().clone() for p in model.agent.parameters()]
    torch.manual_seed(2)
    reference.learn(batch)
    torch.manual_seed(2)
    model.learn(batch.clone())
    moved = 0
    pairs = zip(model.agent.named_parameters(), reference.agent.parameters(), before, strict=True)
    for (name, ours), theirs, start in pairs:
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        moved += bool((ours - start).abs().max() > 1e-3)
    assert moved > len(before) / 2


CASES = {
    "frames": {},
    "frames, windows": {"partition": "windows"},
    "frames, encoded": {"encoder": VectorEncoder},
    "real actions": {"env": PENDULUM},
    "real actions, memory": {"env": PENDULUM, "context": MEMORY, "actor": partial(Hyper, hidden=[4])},
    "windows": {"env": TRIALS, "context": MEMORY},
    "windows, hyper": {"env": TRIALS, "context": MEMORY, "actor": partial(Hyper, hidden=[4]), "critic": FiLM},
    "windows, embedded": {"env": TRIALS, "context": MEMORY, "embedding": partial(VectorEncoder, widths=(3,))},
    "windows, zero": {"env": TRIALS, "context": partial(MEMORY, first_step="zero"), "steps": 6, "batches": 1},
    "steps of windows": {"env": TRIALS, "context": MEMORY, "partition": "steps", "minibatches": 4},
    "task": {"env": TRIALS, "context": TaskContext},
    "decision": {"env": MINIGRID, "encoder": partial(GridEncoder, channels=(4, 4, 6)), "context": OneHotContext,
                 "decision": partial(Hyper, hidden=[])},
    "joined": {"env": MINIGRID, "encoder": partial(GridEncoder, channels=(4, 4, 6)),
               "context": [OneHotContext, MEMORY]},
    "batch advantages": {"normalize_advantage": "batch"},
    "raw advantages": {"normalize_advantage": None},
    "batch advantages of windows": {"env": TRIALS, "context": MEMORY, "normalize_advantage": "batch"},
    "raw advantages of windows": {"env": TRIALS, "context": MEMORY, "normalize_advantage": None},
    "time limits are ends": {"env": PENDULUM, "bootstrap_truncation": False, "normalize_advantage": None},
    "time limits are none": {"env": PENDULUM, "bootstrap_truncation": True, "normalize_advantage": None},
    "scaled rewards": {"env": PENDULUM, "normalize_reward": True, "normalize_advantage": None},
    "own rate of the context": {"env": TRIALS, "context": MEMORY, "context_lr": 3e-3, "context_adam_eps": 1e-3},
    "own rate of a task": {"env": MINIGRID, "encoder": partial(GridEncoder, channels=(4, 4, 6)),
                           "context": partial(OneHotContext, outputs=3), "context_lr": 5e-3},
    "other weights": {"gamma": 0.8, "gae_lambda": 0.5, "adam_eps": 1e-3, "epochs": 3, "minibatches": 3,
                      "loss": PPOLoss(clip=0.05, entropy=0.3, value=0.1)},
    "tight clip": {"env": TRIALS, "context": MEMORY, "max_grad_norm": 0.01, "adam_eps": 1e-3},
    "no clip": {"env": PENDULUM, "max_grad_norm": None},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_updates_of_a_batch_equal_those_by_hand(name):
    assert_same_updates(*learner(**CASES[name]))


def test_batches_here_begin_within_episodes_and_have_terminations_and_truncations():
    after = learner()[1]["next"]
    assert after["terminated"][:, :-1].any()
    assert after["truncated"][:, :-1].any()
    for env in (CARTPOLE, PENDULUM, TRIALS):
        batch = learner(env, context=MEMORY)[1]
        assert (batch["step_count"][:, 0] > 0).any()
        assert batch["context_state"].any()


@pytest.mark.parametrize("normalize", [True, False])
def test_scaled_rewards_take_their_unit_out_of_the_targets(normalize):
    targets = []
    for unit in (1.0, 1000.0):
        model, batch = learner(PENDULUM, normalize_reward=normalize)
        batch["next", "reward"] *= unit
        batch["state_value"][:] = batch["next_value"][:] = 0
        before = batch["next", "reward"].clone()
        seen = []
        model.improve = seen.append
        model.learn(batch)
        assert torch.equal(batch["next", "reward"], before)  # the batch itself keeps its unit
        targets.append(model.estimate(seen[0])["target"])
    factor = 1.0 if normalize else 1000.0
    torch.testing.assert_close(targets[1], factor * targets[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("env", [CARTPOLE, PENDULUM, TRIALS])
def test_the_first_update_sees_ratio_one(env):
    model, batch = learner(env, context=MEMORY)
    first = model.learn(batch)[0]
    assert first["kl"].abs().item() < 1e-5
    assert first["clipped"].item() == 0


def test_a_batch_owes_an_update_for_each_minibatch_of_each_pass():
    model, batch = learner(epochs=3, minibatches=4)
    assert len(model.learn(batch)) == 12


def test_statistics_change_only_after_the_updates_and_then_with_the_batch():
    model, batch = learner(TRIALS, context=TaskContext, normalize_observation=True)
    norms = (model.agent.observation.norm, model.agent.context.norm)
    seen = []
    for norm in norms:
        norm.register_forward_hook(lambda module, *_: seen.append(module.count.item()))
    model.learn(batch)
    assert set(seen) == {0}
    flagged = torch.cat([batch["observation"], batch["episode_done"]], -1)
    for norm, entry in zip(norms, (flagged, batch["task"]), strict=True):
        torch.testing.assert_close(norm.mean, entry.flatten(0, 1).double().mean(0))


def test_updates_may_step_some_groups_alone():
    model, _ = learner(TRIALS, context=MEMORY)
    names = [group["name"] for group in model.optimizer.param_groups]
    assert names == ["heads", "context"]
    before = copy.deepcopy(model.agent)
    loss = sum(p.square().sum() for p in model.agent.parameters())
    norms = model.update(loss, ["context"])
    assert list(norms) == ["context_grad_norm"]
    for (name, now), then in zip(model.agent.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(now, then) != name.startswith("context."), name


def test_norms_are_measured_before_clipping_and_for_each_group():
    model, _ = learner(TRIALS, context=MEMORY, max_grad_norm=1e-3)
    loss = 1e3 * sum(p.sum() for p in model.agent.parameters())
    norms = model.update(loss)
    for group in model.optimizer.param_groups:
        count = sum(p.numel() for p in group["params"])
        assert norms[f"{group['name']}_grad_norm"].item() == pytest.approx(1e3 * count**0.5, rel=1e-4)
        clipped = torch.cat([p.grad.flatten() for p in group["params"]]).norm()
        assert clipped.item() == pytest.approx(1e-3, rel=1e-3)


def test_a_context_without_a_state_is_in_one_group_with_the_heads_unless_it_has_a_rate():
    for options, names in (({}, ["agent"]), ({"context_lr": 1.0}, ["heads", "context"])):
        context = partial(OneHotContext, outputs=3)
        encoder = partial(GridEncoder, channels=(4, 4, 6))
        model, _ = learner(MINIGRID, batches=0, context=context, encoder=encoder, **options)
        groups = model.optimizer.param_groups
        assert [group["name"] for group in groups] == names
        assert sum(len(group["params"]) for group in groups) == len(list(model.agent.parameters()))


def test_a_restored_reward_scale_goes_on_exactly():
    model, batch = learner(PENDULUM, normalize_reward=True)
    other, _ = learner(PENDULUM, normalize_reward=True)
    model.learn(batch)
    other.load_state_dict(model.state_dict())
    other.load_state(model.save_state())
    ours, theirs = model.estimate(batch), other.estimate(batch)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize(("schedule", "left"), [("linear", [1, 2 / 3, 1 / 3]), ("constant", [1, 1, 1])])
def test_learning_rates_decay_linearly_to_zero_over_the_budget(tmp_path, schedule, left):
    seen = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer, model, *_):
            seen.append([group["lr"] for group in model.optimizer.param_groups])

    model = PPO(**HEADS, context=MEMORY, lr=1e-2, context_lr=1e-3, lr_schedule=schedule)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    callbacks = [Run(8 * 5 * 3), Rates()]  # three batches
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=-1, callbacks=callbacks, default_root_dir=tmp_path, **quiet
    )
    trainer.fit(model, datamodule=Rollouts(TRIALS, steps=5, eval_envs=2))
    assert seen == [pytest.approx([1e-2 * share, 1e-3 * share]) for share in left]


@pytest.mark.filterwarnings("ignore:.*not a leaf Tensor.*")  # the compiler looks at what it compiles
@pytest.mark.slow
@pytest.mark.parametrize("case", ["frames", "real actions, memory", "windows, hyper"])
def test_compiled_updates_equal_eager_ones(case):
    assert_same_updates(*learner(**CASES[case], compile=True))


BLIND = {"actor": partial(MLP, hidden=[]), "critic": partial(MLP, hidden=[])}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minibatches": 5}, r"model.minibatches is 5, which does not divide the 48 frames of a collected batch"),
        (
            {"context": MEMORY, "minibatches": 3},
            r"model.minibatches is 3, which does not divide the 4 data.env.num_envs",
        ),
        ({"partition": "windows", "minibatches": 3}, r"does not divide the 4 data.env.num_envs"),
        ({"context": MEMORY, **BLIND}, r"model.context is given, but neither"),
        ({"embedding": VectorEncoder}, r"model.embedding is given without model.context"),
        ({"decision": Concat}, r"model.decision is given without model.context"),
        ({"context_lr": 1e-3}, r"model.context_lr or model.context_adam_eps is given without model.context"),
        ({"context_adam_eps": 1e-3}, r"is given without model.context"),
        ({"env": MINIGRID}, r"data.env shows images \(7, 7, 3\), which need model.encoder"),
        ({"lr": 0.0}, r"\.lr is 0.0"),
        ({"context": MEMORY, "context_lr": 0.0}, r"\.context_lr is 0.0"),
        ({"gamma": 1.5}, r"\.gamma is 1.5"),
        ({"gae_lambda": -0.1}, r"\.gae_lambda is -0.1"),
        ({"max_grad_norm": -1.0}, r"\.max_grad_norm is -1.0"),
        ({"epochs": 0}, r"\.epochs is 0"),
        ({"minibatches": 0}, r"\.minibatches is 0"),
    ],
)
def test_impossible_options_name_the_key(options, message):
    with pytest.raises(RecipeError, match=message):
        learner(batches=0, **options)


def test_steps_of_windows_may_be_parted_finer_than_there_are_windows():
    model, batch = learner(context=MEMORY, partition="steps", minibatches=6)
    assert len(model.learn(batch)) == 12
