"""PPO beside Stable-Baselines3's on Gymnasium environments: the same networks, hyperparameters, frames and seeds.

`python gymnasium_learning.py cartpole 0-4` prints the final return over 100 episodes, most likely actions, of each seed
of both. LunarLander needs `pip install "gymnasium[box2d]"`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import gymnasium
import torch
from gymnasium.wrappers import TimeAwareObservation
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from lightning_hyper.analysis.statistics import bootstrap_interval, interquartile_mean
from lightning_hyper.cli import seeds

CARTPOLE = {
    "id": "CartPole-v1", "envs": 8, "n_steps": 32, "batch_size": 256, "n_epochs": 20, "gamma": 0.98, "gae_lambda": 0.8,
    "ent_coef": 0.0, "learning_rate": lambda left: 1e-3 * left,
}  # fmt: skip
TASKS = {
    "cartpole": ("gymnasium/cartpole", 100_000, CARTPOLE),
    "dictionary": ("gymnasium/cartpole+gymnasium/dictionary", 100_000, CARTPOLE),
    "acrobot": (
        "gymnasium/acrobot", 200_000,
        {"id": "Acrobot-v1", "envs": 16, "n_steps": 256, "batch_size": 64, "n_epochs": 4, "gamma": 0.99,
         "gae_lambda": 0.94, "ent_coef": 0.0, "learning_rate": 3e-4},
    ),
    "lunarlander": (
        "gymnasium/lunarlander", 300_000,
        {"id": "LunarLander-v3", "envs": 16, "n_steps": 1024, "batch_size": 64, "n_epochs": 4, "gamma": 0.999,
         "gae_lambda": 0.98, "ent_coef": 0.01, "learning_rate": 3e-4},
    ),
}  # fmt: skip


def ours(recipe, frames, seed):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lightning_hyper", "fit", "-c", recipe, "--frames", str(frames), "--run", "r"]
        command += ["--seed", str(seed), "--experiment", "e"]
        command += ["--data.eval_envs", "100", "--data.evaluate_every", "null"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return json.loads((Path(folder) / "runs/e/r/finished.json").read_text())["eval/return"]


def theirs(task, frames, seed, *, id, envs, **options):  # noqa: A002
    torch.set_num_threads(1)

    def make():
        env = gymnasium.make(id)
        return TimeAwareObservation(env, flatten=False) if task == "dictionary" else env

    env = make_vec_env(make, envs, seed=seed)
    if task == "acrobot":
        env = VecNormalize(env)
    policy = "MultiInputPolicy" if task == "dictionary" else "MlpPolicy"
    networks = {"net_arch": {"pi": [64, 64], "vf": [64, 64]}}
    model = PPO(policy, env, seed=seed, device="cpu", policy_kwargs=networks, **options)
    model.learn(frames)
    test = make_vec_env(make, 10, seed=seed + 10_000)
    if task == "acrobot":
        test = VecNormalize(test, training=False, norm_reward=False)
        test.obs_rms = env.obs_rms
    return float(evaluate_policy(model, test, n_eval_episodes=100)[0])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    recipe, frames, options = TASKS[sys.argv[1]]
    results = {"ours": [], "Stable-Baselines3": []}
    seconds = dict.fromkeys(results, 0.0)
    for seed in seeds(sys.argv[2]):
        for name, train in (
            ("ours", lambda s=seed: ours(recipe, frames, s)),
            ("Stable-Baselines3", lambda s=seed: theirs(sys.argv[1], frames, s, **options)),
        ):
            start = time.perf_counter()
            results[name].append(train())
            seconds[name] += time.perf_counter() - start
            print(f"{sys.argv[1]}, seed {seed}, {name}: {results[name][-1]:.1f}", flush=True)
    for name, values in results.items():
        low, high = map(float, bootstrap_interval(values))
        figure = f"{float(interquartile_mean(values)):.1f} [{low:.1f}, {high:.1f}] n={len(values)}"
        print(f"{sys.argv[1]}, {frames:,} frames, {name}: {figure}, {seconds[name] / len(values):.0f} s a run")
