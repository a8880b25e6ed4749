"""HalfCheetah and Ant over gymnasium's single environment and over TorchRL's GymEnv, all in the same run.

Prints environment steps a second (median of interleaved windows, lowest and highest) and ratios of medians. The
actions are random and drawn beforehand; episodes are reset where a loop resets them.
"""

import os
import statistics
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium
import mujoco
import numpy as np
import torch
from torchrl.envs import GymEnv

from lightning_hyper import envs

NUM_ENVS, WINDOWS, SECONDS = 64, 7, 0.4


def advance(name, threads):
    env = getattr(envs, name)(NUM_ENVS, threads=threads)
    env.reset()
    actions = torch.rand(32, *env.action_spec.shape) * 2 - 1
    return NUM_ENVS, lambda t: env.simulate(actions[t % 32])


def stepped(env, count):
    """TorchRL's own loop: step, reset what is done, go on."""
    actions = torch.rand(32, *env.action_spec.shape) * 2 - 1
    state = [env.reset()]

    def once(t):
        state[0]["action"] = actions[t % 32]
        state[0] = env.step_and_maybe_reset(state[0])[1]

    return count, once


def single(name):
    env = gymnasium.make(f"{name}-v5")
    env.reset()
    actions = np.random.default_rng(0).uniform(-1, 1, (32, *env.action_space.shape)).astype(np.float32)

    def once(t):
        _, _, terminated, truncated, _ = env.step(actions[t % 32])
        if terminated or truncated:
            env.reset()

    return 1, once


def loops(name):
    family = getattr(envs, name)
    return {
        "gymnasium, single": single(name),
        "TorchRL GymEnv, single": stepped(GymEnv(f"{name}-v5"), 1),
        "ours, TorchRL loop, 1 env": stepped(family(1), 1),
        "ours, TorchRL loop, 1 thread": stepped(family(NUM_ENVS), NUM_ENVS),
        "ours, TorchRL loop, 2 threads": stepped(family(NUM_ENVS, threads=2), NUM_ENVS),
        "ours, simulate, 1 thread": advance(name, 1),
        "ours, simulate, 2 threads": advance(name, 2),
    }


def rate(count, once):
    start, t = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < SECONDS:
        once(t)
        t += 1
    return count * t / passed


def main(name):
    compared = loops(name)
    found = {label: [] for label in compared}
    for _ in range(1 + WINDOWS):
        for label, loop in compared.items():
            found[label].append(rate(*loop))
    # The first window warms up.
    found = {label: sorted(rates[1:]) for label, rates in found.items()}
    middle = {label: statistics.median(rates) for label, rates in found.items()}
    print(f"\n{name}, {NUM_ENVS} environments where not said otherwise")
    print(f"{'':31}{'steps/s':>10}{'lowest':>10}{'highest':>10}{'x gymnasium':>13}{'x GymEnv':>10}")
    for label, rates in found.items():
        ratios = (middle[label] / middle[other] for other in ("gymnasium, single", "TorchRL GymEnv, single"))
        numbers = "".join(f"{number:10,.0f}" for number in (middle[label], rates[0], rates[-1]))
        print(f"{label:31}{numbers}" + "{:13.2f}{:10.2f}".format(*ratios))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    mujoco.set_mju_user_warning(lambda _: None)
    for family in ("HalfCheetah", "Ant"):
        main(family)
