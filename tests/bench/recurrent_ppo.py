"""The peer: sb3-contrib's RecurrentPPO on a Gymnasium GridNavi of 16 trials, at the paper's sizes; prints frames/s."""

import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np

GOALS = [(x, y) for x in range(5) for y in range(5) if x > 1 or y > 1]
MOVES = np.array([[0, 0], [0, 1], [1, 0], [0, -1], [-1, 0]])


class Trial(gym.Env):
    """One trial of four episodes; the observation holds cell, flag, previous action and reward."""

    observation_space = gym.spaces.Box(-10, 10, (9,), np.float32)
    action_space = gym.spaces.Discrete(5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.goal = np.array(GOALS[self.np_random.integers(len(GOALS))])
        self.position, self.steps = np.zeros(2, int), 0
        return np.zeros(9, np.float32), {}

    def step(self, action):
        self.position = (self.position + MOVES[action]).clip(0, 4)
        reward = 1.0 if (self.position == self.goal).all() else -0.1
        self.steps += 1
        over = self.steps % 15 == 0
        observation = np.array([*self.position, over, *np.eye(5)[action], reward], np.float32)
        if over:
            self.position = np.zeros(2, int)
        return observation, reward, self.steps == 60, False, {}


def main(frames):
    import torch
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import DummyVecEnv

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    class Rate(BaseCallback):
        start = 0.0

        def _on_rollout_start(self):
            if not self.start:
                self.start = time.perf_counter()

        def _on_step(self):
            return True

    model = RecurrentPPO(
        "MlpLstmPolicy", DummyVecEnv([Trial] * 16), n_steps=60, batch_size=240, n_epochs=2, gamma=0.95,
        gae_lambda=0.95, clip_range=0.05, ent_coef=0.1, device="cpu",
        policy_kwargs={
            "lstm_hidden_size": 256, "net_arch": [256, 128], "shared_lstm": True, "enable_critic_lstm": False,
        },
    )  # fmt: skip
    rate = Rate()
    model.learn(frames, callback=rate)
    print(f"frames/s {model.num_timesteps / (time.perf_counter() - rate.start):.0f}")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(int(sys.argv[1]))
