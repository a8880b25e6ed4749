"""What Stable-Baselines3 learns with the hyperparameters and frames of a shipped recipe of TD3 or SAC.

`python off_policy_learning.py 0 building_blocks/td3 building_blocks/pendulum` trains seed 0 and prints the return of
the most likely actions in 100 episodes, those by which the recipe is evaluated with `--data.init_args.eval_envs 100`.
The recipe itself is trained by `lightning-hyper sweep`.
"""

import inspect
import os
import sys
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import gymnasium
import numpy as np
import torch
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.noise import NormalActionNoise

from lightning_hyper import envs, recipes
from lightning_hyper.algorithms.off_policy import OffPolicy
from lightning_hyper.experience import Replay, first_episodes

IDS = {"Pendulum": "Pendulum-v1"}
EPISODES, EVAL_SEED = 100, 1_000_003  # data.eval_envs, data.eval_seed


def evaluated(learner, env):
    batched = getattr(envs, env["class_path"])(**env["init_args"] | {"num_envs": EPISODES})
    batched.set_seed(EVAL_SEED)
    batched.in_turn = True
    return float(first_episodes(batched, Learned(learner), deterministic=True)["episode_return"].mean())


class Learned:
    """Theirs, as ours acts."""

    def __init__(self, learner):
        self.learner = learner

    def act(self, step, state):
        action = self.learner.predict(step["observation"].numpy(), deterministic=True)[0]
        return {"action": torch.as_tensor(action)}, state


def defaults(cls):
    """What a recipe leaves out."""
    return {key: option.default for key, option in inspect.signature(cls).parameters.items()}


def main(seed, *layers):
    torch.set_num_threads(1)
    given = recipes.resolve(layers)
    data = {**defaults(Replay), **given["data"]["init_args"]}
    model = {**defaults(OffPolicy), **given["model"]["init_args"]}
    if model["actor_lr"] != model["critic_lr"]:
        sys.exit("Stable-Baselines3 has one learning rate for all")
    task = given["environment"]

    def env():
        return gymnasium.make(IDS.get(task, f"{task}-v5"))

    common = {
        "learning_rate": model["critic_lr"],
        "batch_size": data["batch_size"],
        "buffer_size": min(data["capacity"], given["frames"]),
        "learning_starts": data["warmup_frames"],
        "gamma": model["gamma"],
        "tau": model["tau"],
        "train_freq": 1,
        "gradient_steps": 1,
        "policy_kwargs": {"net_arch": model["actor"]["init_args"]["hidden"]},
        "seed": seed,
        "device": "cpu",
    }
    if given["model"]["class_path"] == "TD3":
        size = env().action_space.shape
        noise = NormalActionNoise(np.zeros(size), model["exploration_noise"] * np.ones(size))
        learner = TD3("MlpPolicy", env(), action_noise=noise, **common)
    else:
        learner = SAC("MlpPolicy", env(), ent_coef=model["alpha"], **common)
    learner.learn(given["frames"])
    print(
        f"{' '.join(layers)} seed {seed} frames {given['frames']} return {evaluated(learner, data['env']):.2f}",
        flush=True,
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(int(sys.argv[1]), *sys.argv[2:])
