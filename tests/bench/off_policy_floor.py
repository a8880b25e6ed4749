"""The floor: TD3 or SAC on HalfCheetah in bare PyTorch, one update for each frame, with the plain recipe's networks.

No framework, no evaluation, no checkpoints. `python off_policy_floor.py td3 256 4000` prints frames/s; its clock starts
at frame 2,000.
"""

import copy
import os
import sys
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import gymnasium
import torch
from torch import nn
from torch.nn import functional as F

from lightning_hyper.training.matmul import choose_matmul

WARM_UP, START = 1_000, 2_000
LOG_TWO_PI = 1.8378770664093453


def mlp(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, outputs))


class Replay:
    def __init__(self, capacity, state, action):
        self.entries = [torch.zeros(capacity, width) for width in (state, action, 1, state, 1)]
        self.count = 0

    def add(self, *frame):
        for entry, value in zip(self.entries, frame, strict=True):
            entry[self.count] = torch.as_tensor(value)
        self.count += 1

    def sample(self, size):
        index = torch.randint(self.count, (size,))
        return [entry[index] for entry in self.entries]


class TD3:
    def __init__(self, state, action):
        self.actor, self.critics = mlp(state, action), nn.ModuleList(mlp(state + action, 1) for _ in range(2))
        self.actor_target, self.critics_target = copy.deepcopy(self.actor), copy.deepcopy(self.critics)
        self.actor_step = torch.optim.Adam(self.actor.parameters(), 3e-4, fused=True)
        self.critic_step = torch.optim.Adam(self.critics.parameters(), 3e-4, fused=True)
        self.updates = 0

    @torch.no_grad()
    def act(self, state):
        action = torch.tanh(self.actor(state))
        return (action + 0.1 * torch.randn_like(action)).clamp(-1, 1)

    def update(self, state, action, reward, after, terminated):
        self.updates += 1
        with torch.no_grad():
            noise = (0.2 * torch.randn_like(action)).clamp(-0.5, 0.5)
            x = torch.cat([after, (torch.tanh(self.actor_target(after)) + noise).clamp(-1, 1)], -1)
            target = reward + 0.99 * (1 - terminated) * torch.minimum(*(q(x) for q in self.critics_target))
        x = torch.cat([state, action], -1)
        step(self.critic_step, sum(F.mse_loss(q(x), target) for q in self.critics))
        if self.updates % 2 == 0:
            self.critics.requires_grad_(False)
            step(self.actor_step, -self.critics[0](torch.cat([state, torch.tanh(self.actor(state))], -1)).mean())
            self.critics.requires_grad_(True)
            follow(self.critics_target, self.critics)
            follow(self.actor_target, self.actor)


class SAC:
    def __init__(self, state, action):
        self.actor, self.critics = mlp(state, 2 * action), nn.ModuleList(mlp(state + action, 1) for _ in range(2))
        self.critics_target = copy.deepcopy(self.critics)
        self.actor_step = torch.optim.Adam(self.actor.parameters(), 3e-4, fused=True)
        self.critic_step = torch.optim.Adam(self.critics.parameters(), 3e-4, fused=True)

    def draw(self, state):
        mean, log_std = self.actor(state).chunk(2, -1)
        log_std, noise = log_std.clamp(-20, 2), torch.randn_like(mean)
        raw = mean + log_std.exp() * noise
        squash = 2 * (0.6931471805599453 - raw - F.softplus(-2 * raw))
        log_prob = -0.5 * noise.square() - log_std - 0.5 * LOG_TWO_PI - squash
        return torch.tanh(raw), log_prob.sum(-1, keepdim=True)

    @torch.no_grad()
    def act(self, state):
        return self.draw(state)[0]

    def update(self, state, action, reward, after, terminated):
        with torch.no_grad():
            next_action, log_prob = self.draw(after)
            x = torch.cat([after, next_action], -1)
            value = torch.minimum(*(q(x) for q in self.critics_target)) - 0.2 * log_prob
            target = reward + 0.99 * (1 - terminated) * value
        x = torch.cat([state, action], -1)
        step(self.critic_step, 0.5 * sum(F.mse_loss(q(x), target) for q in self.critics))
        self.critics.requires_grad_(False)
        drawn, log_prob = self.draw(state)
        x = torch.cat([state, drawn], -1)
        step(self.actor_step, (0.2 * log_prob - torch.minimum(*(q(x) for q in self.critics))).mean())
        self.critics.requires_grad_(True)
        follow(self.critics_target, self.critics)


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def follow(target, network):
    torch._foreach_lerp_(list(target.parameters()), list(network.parameters()), 0.005)


def main(name, size, frames):
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    choose_matmul()
    env = gymnasium.make("HalfCheetah-v5")
    agent, replay = {"td3": TD3, "sac": SAC}[name](17, 6), Replay(START + frames, 17, 6)
    observation, _ = env.reset(seed=0)
    for frame in range(START + frames):
        if frame == START:
            start = time.perf_counter()
        if frame < WARM_UP:
            action = env.action_space.sample()
        else:
            action = agent.act(torch.as_tensor(observation, dtype=torch.float32)).numpy()
        after, reward, terminated, truncated, _ = env.step(action)
        replay.add(observation, action, reward, after, float(terminated))
        observation = env.reset()[0] if terminated or truncated else after
        if frame >= WARM_UP:
            agent.update(*replay.sample(size))
    print(f"frames/s {frames / (time.perf_counter() - start):.1f}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
