"""Mine mazes and T-mazes, alone and in trials, at several widths, all in the same run.

Prints environment steps a second (median of interleaved windows, lowest and highest) and ratios to the maze LS alone.
The actions are random and drawn beforehand; observations are made at every step, and episodes that end start anew.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from minigrid_stepping import compare

from lightning_hyper.envs import MineMaze, TMaze, Trials

SIZES, GPU_SIZES = (16, 256, 4096), (4096, 65536)


def played(env):
    """What `advance` and `begin` alone take."""
    actions = torch.randint(3, (32, *env.batch_size), device=env.device)
    env.begin()

    def once(t):
        done = env.advance(actions[t % 32])["done"]
        if done.any():
            env.begin(done.squeeze(-1))

    return env.batch_size[0], once


def in_torchrl(env):
    """TorchRL's own loop."""
    actions = torch.randint(3, (32, *env.batch_size), device=env.device)
    state = [env.reset()]

    def once(t):
        state[0]["action"] = actions[t % 32]
        state[0] = env.step_and_maybe_reset(state[0])[1]

    return env.batch_size[0], once


def main(size, device):
    sizes = {"num_envs": size, "device": device}
    loops = {
        "LS": played(MineMaze(**sizes)),
        "LSN": played(MineMaze(kind="LSN", **sizes)),
        "LS, 42x42": played(MineMaze(size=42, **sizes)),
        "LS, trials of two": played(Trials(MineMaze, 2, **sizes)),
        "the same, TorchRL's loop": in_torchrl(Trials(MineMaze, 2, **sizes)),
        "T-maze of 100": played(TMaze(length=100, **sizes)),
    }
    compare(f"{size} environments, {device}", loops, "LS")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for size in SIZES:
        main(size, "cpu")
    for size in GPU_SIZES if torch.cuda.is_available() else ():
        main(size, "cuda")
