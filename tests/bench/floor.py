"""The floor: PPO through a GRU on GridNavi in bare PyTorch, with the networks, batch and updates of the fast recipe.

No framework, no normalisation, no evaluation, no checkpoints. `python floor.py rnn_hn 1500000` prints frames/s.
"""

import os
import sys
import time
from itertools import pairwise

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from torch.nn import functional as F

from lightning_hyper.training.matmul import choose_matmul

ENVS, STEPS, EPISODES, ACTIONS = 256, 15, 4, 5
MOVES = torch.tensor([[0, 0], [0, 1], [1, 0], [0, -1], [-1, 0]])
GOALS = torch.tensor([(x, y) for x in range(5) for y in range(5) if x > 1 or y > 1])


class HyperHead(nn.Module):
    def __init__(self, context, sizes):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.Linear(context, i * o), nn.Linear(context, o)]) for i, o in pairwise(sizes)
        )

    def forward(self, x, c):
        for k, (weight, bias) in enumerate(self.layers):
            x = (weight(c).unflatten(-1, (-1, x.shape[-1])) @ x.unsqueeze(-1)).squeeze(-1) + bias(c)
            x = torch.tanh(x) if k + 1 < len(self.layers) else x
        return x


class PlainHead(nn.Sequential):
    def forward(self, x, c):
        return super().forward(c)


class Agent(nn.Module):
    def __init__(self, method):
        super().__init__()
        self.embeddings = nn.ModuleList([nn.Linear(3, 16), nn.Linear(5, 8), nn.Linear(1, 8)])
        self.rnn = nn.GRU(32, 64)
        if method == "rnn_hn":
            self.actor, self.critic = HyperHead(64, (3, 32, ACTIONS)), HyperHead(64, (3, 32, 1))
        else:
            self.actor, self.critic = (
                PlainHead(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, out)) for out in (ACTIONS, 1)
            )

    def forward(self, x, action, reward, h):
        parts = (x, F.one_hot(action, ACTIONS).float(), reward)
        c, h = self.rnn(torch.cat([F.relu(e(p)) for e, p in zip(self.embeddings, parts, strict=True)], -1), h)
        return self.actor(x, c), self.critic(x, c).squeeze(-1), h


def collect(agent):
    goal = GOALS[torch.randint(len(GOALS), (ENVS,))]
    position = torch.zeros(ENVS, 2, dtype=torch.long)
    x, action, reward, h = torch.zeros(ENVS, 3), torch.zeros(ENVS, dtype=torch.long), torch.zeros(ENVS, 1), None
    rows = []
    for t in range(STEPS * EPISODES):
        logits, value, h = agent(x[None], action[None], reward[None], h)
        policy = torch.distributions.Categorical(logits=logits[0], validate_args=False)
        taken = policy.sample()
        position = (position + MOVES[taken]).clamp(0, 4)
        gain = torch.where((position == goal).all(-1), 1.0, -0.1)
        rows.append((x, action, reward, taken, policy.log_prob(taken), value[0], gain))
        over = (t + 1) % STEPS == 0
        x = torch.cat([position.float(), torch.full((ENVS, 1), float(over))], -1)
        action, reward = taken, gain[:, None]
        position = torch.zeros_like(position) if over else position
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def main(method, frames):
    choose_matmul("auto")
    torch.manual_seed(0)
    agent = Agent(method)
    optimizer = torch.optim.Adam(agent.parameters(), lr=7e-4, eps=1e-5, fused=True)
    start, done = time.perf_counter(), 0
    while done < frames:
        with torch.no_grad():
            x, action, reward, taken, log_prob, value, gain = collect(agent)
            advantage, running = torch.zeros_like(value), torch.zeros(ENVS)
            for t in reversed(range(len(value))):
                after = value[t + 1] if t + 1 < len(value) else torch.zeros(ENVS)
                running = gain[t] + 0.95 * after - value[t] + 0.95 * 0.95 * running
                advantage[t] = running
            target = advantage + value
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-5)
        for _ in range(2):
            for part in torch.randperm(ENVS).chunk(4):
                logits, v, _ = agent(x[:, part], action[:, part], reward[:, part], None)
                policy = torch.distributions.Categorical(logits=logits, validate_args=False)
                ratio = (policy.log_prob(taken[:, part]) - log_prob[:, part]).exp()
                a, r, old = advantage[:, part], target[:, part], value[:, part]
                near = old + (v - old).clamp(-0.2, 0.2)
                value_loss = (
                    0.5
                    * torch.max(
                        F.smooth_l1_loss(v, r, reduction="none"), F.smooth_l1_loss(near, r, reduction="none")
                    ).mean()
                )
                policy_loss = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()
                loss = policy_loss + 0.5 * value_loss - 0.01 * policy.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
        done += ENVS * STEPS * EPISODES
    print(f"frames/s {done / (time.perf_counter() - start):.0f}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        main(sys.argv[1], int(sys.argv[2]))
