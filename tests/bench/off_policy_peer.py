"""The peer: Stable-Baselines3's TD3 or SAC on HalfCheetah, one update for each frame, 256x256 networks.

`python off_policy_peer.py td3 256 4000` prints frames/s, the clock started at frame 2,000.
"""

import os
import sys
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import gymnasium
import numpy as np
import torch
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import NormalActionNoise

WARM_UP, START = 1_000, 2_000


class Rate(BaseCallback):
    start = None

    def _on_step(self):
        if self.num_timesteps == START:
            self.start = time.perf_counter()
        return True


def main(name, size, frames):
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rate, common = Rate(), {"batch_size": size, "learning_starts": WARM_UP, "train_freq": 1, "gradient_steps": 1}
    common |= {"learning_rate": 3e-4, "policy_kwargs": {"net_arch": [256, 256]}, "device": "cpu"}
    env = gymnasium.make("HalfCheetah-v5")
    if name == "td3":
        model = TD3("MlpPolicy", env, action_noise=NormalActionNoise(np.zeros(6), 0.1 * np.ones(6)), **common)
    else:
        model = SAC("MlpPolicy", env, ent_coef=0.2, **common)
    model.learn(START + frames, callback=rate)
    print(f"frames/s {frames / (time.perf_counter() - rate.start):.1f}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
