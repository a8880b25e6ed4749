"""The peer: Stable-Baselines3's PPO on one MiniGrid task, with the paper's network and hyperparameters.

`python ppo_peer.py MiniGrid-DoorKey-6x6-v0 0 100000` trains seed 0 and prints frames/s, then the mean return of 200
episodes on other levels, with sampled actions.
"""

import os
import sys
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import gymnasium
import minigrid  # noqa: F401  registers its tasks
import numpy as np
import torch
from minigrid.wrappers import ImgObsWrapper
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

WARM_UP = 1  # updates before the clock starts


class Rate(BaseCallback):
    rollouts, start, begin = 0, None, 0

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        if self.rollouts == WARM_UP:
            self.start, self.begin = time.perf_counter(), self.num_timesteps
        self.rollouts += 1


class Convolutions(BaseFeaturesExtractor):
    def __init__(self, space):
        super().__init__(space, features_dim=64)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 2), nn.ReLU(), nn.Conv2d(32, 64, 2),
            nn.ReLU(), nn.Flatten(),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


class Image(gymnasium.ObservationWrapper):
    """Codes as float numbers, channels first, as the extractor wants them."""

    def __init__(self, env):
        super().__init__(ImgObsWrapper(env))
        self.observation_space = gymnasium.spaces.Box(0, 10, (3, 7, 7), np.float32)

    def observation(self, observation):
        return observation.transpose(2, 0, 1).astype(np.float32)


def environments(task, count):
    return DummyVecEnv([lambda: Monitor(Image(gymnasium.make(task))) for _ in range(count)])


def main(task, seed, frames):
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rate = Rate()
    model = PPO(
        "CnnPolicy", environments(task, 16), seed=seed, device="cpu", n_steps=128, batch_size=256, n_epochs=4,
        learning_rate=1e-3, gamma=0.99, gae_lambda=0.95, clip_range=0.2, ent_coef=0.01, vf_coef=0.5,
        max_grad_norm=0.5, normalize_advantage=True,
        policy_kwargs={
            "features_extractor_class": Convolutions, "normalize_images": False, "activation_fn": nn.Tanh,
            "net_arch": {"pi": [64], "vf": [64]}, "ortho_init": False, "optimizer_kwargs": {"eps": 1e-8},
        },
    )  # fmt: skip
    model.learn(frames, callback=rate)
    print(f"frames/s {(model.num_timesteps - rate.begin) / (time.perf_counter() - rate.start):.1f}")
    held_out = environments(task, 16)
    held_out.seed(1_000_003)
    mean, _ = evaluate_policy(model, held_out, n_eval_episodes=200, deterministic=False)
    print(f"{task} seed {seed} frames {model.num_timesteps} return {mean:.4f}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
