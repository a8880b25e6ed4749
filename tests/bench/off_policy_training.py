"""TD3 and SAC on HalfCheetah end to end, by the command line with checkpoints and MLflow, over Stable-Baselines3 and
over a bare PyTorch loop; and updates of the hypernetwork critics.

Each pair of commands runs in turn, so that a ratio holds when the machine's speed drifts.
"""

import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial

import torch
from gridnavi_training import HERE, run, show

FRAMES = 2_000
START = 2_000  # frames before the clock starts: 1,000 of random actions, 1,000 in which imports in the background end


def ours(name, size, threads=1, *options):
    """Frames/s of the last `FRAMES`."""
    # An evaluation is a twentieth of the frames between two, and prints the line that stops the clock.
    data = {"batch_size": size, "evaluate_every": START, "eval_envs": 1, "env.init_args.episode_steps": START // 20}
    settings = [part for key, value in data.items() for part in (f"--data.init_args.{key}", str(value))]
    recipe = ["-c", f"building_blocks/{name}", "-c", "building_blocks/halfcheetah", "--frames", str(START + FRAMES)]
    command = [sys.executable, "-m", "lightning_hyper", "fit", *recipe, "--threads", str(threads)]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen([*command, *settings, *options], cwd=folder, stdout=subprocess.PIPE, text=True)
        seen = {}
        for line in process.stdout:
            found = re.match(r"frames ([\d,]+)/", line)
            if found:
                seen[int(found[1].replace(",", ""))] = time.perf_counter()
        if process.wait():
            sys.exit(f"{name} failed")
    return FRAMES / (seen[START + FRAMES] - seen[START])


def other(script, name, size, threads):
    return float(run([str(HERE / script), name, str(size), str(FRAMES)], threads, HERE).split()[-1])


def updates(algorithm, critic, size, count, threads):
    """Updates/s on one minibatch of HalfCheetah's sizes."""
    from lightning_hyper.envs import Spaces

    torch.set_num_threads(threads)
    model = algorithm(critic=critic)
    model.build(Spaces((17,), 6, False, (-1.0,) * 6, (1.0,) * 6))
    minibatch = model.preprocess(
        {
            "observation": torch.randn(size, 17),
            "action": torch.rand(size, 6) * 2 - 1,
            "reward": torch.randn(size, 1),
            "steps": torch.ones(size, dtype=torch.int64),
            "next_observation": torch.randn(size, 17),
            "terminated": torch.zeros(size, dtype=torch.bool),
        }
    )
    for _ in range(4):
        model.learn_minibatch(minibatch)
    start = time.perf_counter()
    for _ in range(count):
        model.learn_minibatch(minibatch)
    return count / (time.perf_counter() - start)


def hypernetworks():
    from lightning_hyper.algorithms import SAC, TD3
    from lightning_hyper.nn import Concat, Hyper, ResidualTrunk
    from lightning_hyper.training.matmul import choose_matmul

    print(choose_matmul().sentence)
    print("updates/s, median of 3: batch 100, batch 256, batch 256 in bfloat16")
    hyper = partial(Hyper, activation="relu", gain=True, init="sarafian")
    critics = {
        "plain": (partial(Concat, hidden=[256, 256], activation="relu"), 200),
        "hypernetwork, compact": (
            partial(hyper, hidden=[64], trunk=partial(ResidualTrunk, widths=(64, 128), blocks=1)),
            100,
        ),
        "hypernetwork, paper's size": (partial(hyper, hidden=[256], trunk=ResidualTrunk), 10),
    }
    for algorithm in (TD3, SAC):
        for name, (critic, count) in critics.items():
            for threads in (1, 2):
                rates = []
                for size, bf16 in ((100, False), (256, False), (256, True)):
                    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                        rates.append(
                            statistics.median(updates(algorithm, critic, size, count, threads) for _ in range(3))
                        )
                print(
                    f"  {algorithm.__name__} {name:28} {threads} thread(s) " + "".join(f"{r:9.1f}" for r in rates),
                    flush=True,
                )


if __name__ == "__main__":
    print("frames/s, median of 3 rounds, and the ratio A/B (least, median, largest)")
    print(f"{'':52} {'A':>9} {'B':>9}")
    for name, size in (("sac", 256), ("td3", 256), ("td3", 100)):
        for threads in (1, 2):
            show(
                f"A {name} batch {size}, 1 thread; B SB3, {threads} thread(s)",
                lambda n=name, s=size: ours(n, s),
                lambda n=name, s=size, t=threads: other("off_policy_peer.py", n, s, t),
            )
        show(
            f"A {name} batch {size}, 1 thread; B bare PyTorch loop",
            lambda n=name, s=size: ours(n, s),
            lambda n=name, s=size: other("off_policy_floor.py", n, s, 1),
        )
    hypernetworks()
