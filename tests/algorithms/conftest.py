"""Shared by the tests of TD3 and SAC: the same networks and minibatches in Stable-Baselines3."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_hyper.nn import Concat


@pytest.fixture
def peer():
    """Stable-Baselines3's algorithm of a model's name, beside it: `peer(model, spaces, policies)`."""
    pytest.importorskip("stable_baselines3")
    return Peer


class Peer:
    """Stable-Baselines3's algorithm with our weights, and plain SGD for all that it optimises.

    `policies` gives pairs of parameters of our policies and its own.
    """

    def __init__(self, model, spaces, policies, lr=1.0, **options):
        import gymnasium
        import numpy as np
        import stable_baselines3

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
                pairs.append((first[:, [2, 3, 4, 0, 1]] if model.order == "SA" else first, other_first))
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
        return tuple(value.unsqueeze(-1) for value in self.critics(observation, action))

    def q1_forward(self, observation, action):
        return self.critics.value(observation, action).unsqueeze(-1)
