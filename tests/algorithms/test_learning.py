"""What remembers solves a task that nothing without a memory can."""

from functools import partial

import gymnasium
import numpy as np
import pytest
import torch

from lightning_hyper.algorithms import PPO
from lightning_hyper.envs import Gym, Spaces
from lightning_hyper.experience import Rollouts
from lightning_hyper.modules import RecurrentContext
from lightning_hyper.nn import GRU, Concat, Hyper
from lightning_hyper.objectives import PPOLoss


class Cue(gymnasium.Env):
    """A cue is shown at first, and the action three frames later is to be it: 0.5 for whoever does not remember."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.cue = 0, int(self.np_random.integers(2))
        return np.array([2 * self.cue - 1, 0], dtype=np.float32), {}

    def step(self, action):
        self.time += 1
        over = self.time == 3
        return np.array([0, self.time / 3], dtype=np.float32), float(over and action == self.cue), over, False, {}


gymnasium.register("CueForTests-v0", Cue)


@pytest.mark.parametrize(("remembers", "network"), [(False, Concat), (True, Concat), (True, Hyper)])
def test_only_what_remembers_learns_to_repeat_a_cue(remembers, network):
    torch.manual_seed(0)
    data = Rollouts(partial(Gym, "CueForTests-v0", num_envs=32), steps=30, eval_envs=200)
    data.connect(seed=0)
    head = partial(network, hidden=[16])
    context = partial(RecurrentContext, encoder=partial(GRU, hidden=16)) if remembers else None
    model = PPO(actor=head, critic=head, context=context, lr=5e-3, loss=PPOLoss(entropy=0.01))
    model.build(Spaces.of(data.env))
    data.begin(model.policy)
    for _ in range(25):
        model.learn(data.collect())
    reached = float(data.evaluate(model.policy)["eval/return"])
    assert reached > 0.95 if remembers else 0.35 < reached < 0.65
