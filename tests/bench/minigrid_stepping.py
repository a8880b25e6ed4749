"""MiniGrid's batched engine over the package in a loop, on the paper's seven tasks, all in the same run.

Prints environment steps a second and their ratios (median of interleaved windows, lowest and highest). The actions are
random and drawn beforehand; observations are made at every step, and episodes that end start anew. All levels are made
before the clock starts. On a GPU the engine is timed there too, plain and compiled.
"""

import os
import statistics

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from mujoco_stepping import rate

from lightning_hyper.envs import MiniGrid

SIZES, GPU_SIZES, WINDOWS, LEVELS = (16, 256, 1024, 4096), (1024, 16384, 65536), 7, 256


def made(num_envs, engine, device="cpu"):
    env = MiniGrid(num_envs, engine=engine, levels=LEVELS, device=device)
    env.set_seed(0)
    if engine == "batched":
        pairs = torch.cartesian_prod(torch.arange(len(env.tasks)), torch.arange(LEVELS))
        env.engine.levels.find(env.engine.seed, *pairs.unbind(1))
    env.reset()
    return env, torch.randint(7, (32, num_envs), device=env.device)


def alone(num_envs, engine, device="cpu", compiled=False):
    env, actions = made(num_envs, engine, device)
    step = torch.compile(env.engine.step, dynamic=False) if compiled else env.engine.step

    def once(t):
        _, terminated, truncated = step(actions[t % 32])
        rows = (terminated | truncated).nonzero().flatten().cpu()
        if len(rows):
            env.engine.start(rows, env.draw(rows))

    return num_envs, once


def in_torchrl(num_envs, engine, device="cpu"):
    env, actions = made(num_envs, engine, device)
    state = [env.reset()]

    def once(t):
        state[0]["action"] = actions[t % 32]
        state[0] = env.step_and_maybe_reset(state[0])[1]

    return num_envs, once


def spread(values, form):
    values = sorted(values)
    return "".join(f"{number:{form}}" for number in (statistics.median(values), values[0], values[-1]))


def compare(title, loops, base):
    """Ratios are of windows side by side, so that what else runs on the machine falls on both."""
    found = {label: [] for label in loops}
    for _ in range(1 + WINDOWS):
        for label, loop in loops.items():
            found[label].append(rate(*loop))
    print(f"\n{title}\n{'':28}{'steps/s':>12}{'lowest':>12}{'highest':>12}{'ratio':>9}{'lowest':>9}{'highest':>9}")
    for label, rates in found.items():
        # The first window warms up.
        ratios = [mine / theirs for mine, theirs in zip(rates[1:], found[base][1:], strict=True)]
        print(f"{label:28}{spread(rates[1:], '12,.0f')}{spread(ratios, '9.1f')}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for size in SIZES:
        loops = {
            "package": alone(size, "minigrid"),
            "batched": alone(size, "batched"),
            "package, TorchRL's loop": in_torchrl(size, "minigrid"),
            "batched, TorchRL's loop": in_torchrl(size, "batched"),
        }
        compare(f"{size} environments, CPU, one thread", loops, "package")
    for size in GPU_SIZES if torch.cuda.is_available() else ():
        loops = {
            "package, 16 environments": alone(16, "minigrid"),
            "batched": alone(size, "batched", "cuda"),
            "batched, compiled": alone(size, "batched", "cuda", compiled=True),
            "batched, TorchRL's loop": in_torchrl(size, "batched", "cuda"),
        }
        compare(f"{size} environments, {torch.cuda.get_device_name()}", loops, "package, 16 environments")
