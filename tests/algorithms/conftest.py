"""Shared by the tests of TD3 and SAC: models, minibatches, an environment, and the same in Stable-Baselines3."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from lightning_hyper.envs import BatchedEnv
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.experience.replay import Replayed
from lightning_hyper.nn import MLP, Concat, Hyper, ResidualTrunk

SPACES = {
    "unit": Spaces(observation=(3,), actions=2, discrete=False, low=(-1.0, -1.0), high=(1.0, 1.0)),
    "wide": Spaces(observation=(3,), actions=2, discrete=False, low=(-2.0, 1.0), high=(1.0, 5.0)),
}
CRITICS = {
    "plain": partial(Concat, hidden=[8, 7], activation="relu"),
    "hyper": partial(
        Hyper, hidden=[5], activation="relu", init="hyperfan_in", gain=True,
        trunk=partial(ResidualTrunk, widths=(6, 7), blocks=1),
    ),
}  # fmt: skip


@pytest.fixture
def built():
    """A small model with targets of their own and plain SGD: at a rate of 1 a step is minus the gradient."""

    def build(cls, spaces="wide", critic="plain", *, lr=1.0, **options):
        actor = partial(MLP, hidden=[6, 5], activation="relu")
        model = cls(actor=actor, critic=CRITICS.get(critic, critic), **options)
        torch.manual_seed(1)
        model.build(SPACES.get(spaces, spaces))
        with torch.no_grad():
            for target in (model.target_critics, getattr(model, "target_actor", nn.Module())):
                for parameter in target.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        groups = [{"name": g["name"], "params": g["params"]} for g in model.parameter_groups()]
        model._optimizer = torch.optim.SGD(groups, lr=lr)
        return model

    return build


@pytest.fixture
def drawn():
    """Samples as a replay buffer gives them, with all ends that there are."""

    def draw(spaces="wide", size=32, n_step=1):
        low, high = (torch.tensor(bound) for bound in (SPACES[spaces].low, SPACES[spaces].high))
        steps = torch.randint(1, n_step + 1, (size,))
        return {
            "observation": torch.randn(size, 3),
            "action": low + (high - low) * torch.rand(size, 2),
            "reward": torch.randn(size, n_step) * (torch.arange(n_step) < steps[:, None]),
            "steps": steps,
            "next_observation": torch.randn(size, 3),
            "terminated": torch.rand(size) < 0.3,
        }

    return draw


class Given(Replayed):
    """Chosen minibatches; keeps what priorities it was given."""

    def __init__(self, samples):
        after = {"done": torch.zeros(2, 5, 1, dtype=torch.bool), "reward": torch.zeros(2, 5, 1)}
        collected = TensorDict({"observation": torch.arange(30.0).view(2, 5, 3), "next": after}, [2])
        super().__init__(collected, len(samples), len(samples[0]["action"]), None)
        self.samples, self.priorities = samples, []

    def blocks(self):
        yield from self.samples

    def prioritize(self, minibatch, error):
        self.priorities.append((minibatch.get("index"), error))


@pytest.fixture
def given():
    return Given


class Tasks(BatchedEnv):
    """Episodes of 3, 4 and 5 frames in turn, of which each third terminates; an action is best near the task."""

    def __init__(self, num_envs=2, *, indexed=False, device="cpu"):
        super().__init__(num_envs, device)
        self.horizon, self.indexed = 5, indexed
        self.tasks = ("left", "middle", "right") if indexed else ()
        bound = torch.tensor([2.0, 2.0])
        self._make_specs((3,), (-bound, bound), task_features=0 if indexed else 2)
        self.frame = torch.zeros(num_envs, dtype=torch.int64)
        self.episode = torch.arange(num_envs)
        self.task = torch.zeros(num_envs, dtype=torch.int64) if indexed else torch.zeros(num_envs, 2)
        self.seen = torch.zeros(num_envs, 3)

    def draw_tasks(self, rows):
        if self.indexed:
            fresh = torch.randint(3, (len(rows),), generator=self.generator)
        else:
            fresh = torch.rand(len(rows), 2, generator=self.generator)
        self.task = torch.where(rows if self.indexed else rows.unsqueeze(-1), fresh, self.task)

    def start(self, rows):
        self.episode, self.frame = self.episode + rows, self.frame.masked_fill(rows, 0)
        self.seen = torch.rand(len(rows), 3, generator=self.generator)

    def observation(self):
        return self.seen

    def entries(self):
        return {"task": self.task}

    def simulate(self, action):
        self.frame = self.frame + 1
        self.seen = torch.rand(len(action), 3, generator=self.generator)
        best = (self.task.unsqueeze(-1) - 1).float() if self.indexed else self.task
        over = self.frame >= 3 + self.episode % 3
        return self.seen, -(action - best).square().sum(-1), over & (self.episode % 3 == 0)

    def truncated(self, step_count):
        return (self.frame >= 3 + self.episode % 3).unsqueeze(-1)

    def snapshot(self):
        return {"frame": self.frame, "episode": self.episode, "task": self.task, "seen": self.seen}

    def restore(self, state):
        for key, entry in state.items():
            if key not in ("generator", "current"):
                setattr(self, key, entry)


@pytest.fixture
def tasks():
    return Tasks


@pytest.fixture
def peer():
    """Stable-Baselines3's algorithm of a model's name, beside it: `peer(model, policies)`."""
    pytest.importorskip("stable_baselines3")
    return Peer


class Peer:
    """Stable-Baselines3's algorithm with our weights, and plain SGD for all that it optimises.

    `policies` gives pairs of parameters of our policies and its own.
    """

    def __init__(self, model, policies, lr=1.0, **options):
        import gymnasium
        import numpy as np
        import stable_baselines3

        spaces = model.spaces

        class Env(gymnasium.Env):
            observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
            action_space = gymnasium.spaces.Box(np.float32(spaces.low), np.float32(spaces.high))

        self.model, self.spaces, self.policies, self.recorded = model, spaces, policies, {}
        self.algorithm = getattr(stable_baselines3, type(model).__name__)(
            "MlpPolicy", Env(), learning_rate=lr, buffer_size=1, gamma=model.gamma, tau=model.tau, device="cpu",
            policy_kwargs={"net_arch": {"pi": [6, 5], "qf": [8, 7]}, "optimizer_class": torch.optim.SGD}, **options,
        )  # fmt: skip
        record = SimpleNamespace(record=lambda key, value, **_: self.recorded.update({key: value}))
        self.algorithm.set_logger(record)
        if not isinstance(model.critics.first, Concat):
            self.algorithm.critic = Borrowed(model.critics, lr)
            self.algorithm.critic_target = Borrowed(model.target_critics, lr)
        with torch.no_grad():
            for ours, theirs in self.parameters():
                theirs.copy_(ours)

    def parameters(self):
        """Pairs of our parameters and theirs, all that are learned but the entropy coefficient."""
        model, theirs = self.model, self.algorithm
        pairs = self.policies(model, theirs)
        for ours, other in ((model.critics, theirs.critic), (model.target_critics, theirs.critic_target)):
            if isinstance(other, Borrowed):
                pairs += zip(ours.parameters(), other.critics.parameters(), strict=True)
                continue
            for a, b in ((ours.first, other.qf0), (ours.second, other.qf1)):
                (first, *rest), (other_first, *other_rest) = a.parameters(), b.parameters()
                # Theirs sees the state first.
                pairs.append((first[:, [2, 3, 4, 0, 1]] if model.critics.context == ("state",) else first, other_first))
                pairs += zip(rest, other_rest, strict=True)
        return pairs

    def train(self, minibatches):
        """One update for each of our minibatches."""
        from stable_baselines3.common.type_aliases import ReplayBufferSamples

        gamma, low, high = self.model.gamma, torch.tensor(self.spaces.low), torch.tensor(self.spaces.high)
        samples = iter(  # its buffer stores actions scaled to [-1, 1]
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
        self.algorithm.replay_buffer = SimpleNamespace(sample=lambda *_, **__: next(samples))
        self.algorithm.train(gradient_steps=len(minibatches))

    def assert_same_networks(self):
        for ours, theirs in self.parameters():
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


class Borrowed(nn.Module):
    """Our critics as Stable-Baselines3 calls its own."""

    def __init__(self, critics, lr):
        super().__init__()
        self.critics = copy.deepcopy(critics).requires_grad_(True)
        self.optimizer = torch.optim.SGD(self.critics.parameters(), lr=lr)

    def forward(self, observation, action):
        return tuple(value.unsqueeze(-1) for value in self.critics({"observation": observation}, action))

    def q1_forward(self, observation, action):
        return self.critics.value({"observation": observation}, action).unsqueeze(-1)
