"""Training end to end, by the command line with evaluation, checkpoints and MLflow, over its bare floor and a peer.

Each pair of commands runs in turn, so that a ratio holds when the machine's speed drifts.
"""

import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
QUIET = ("--data.evaluate_every", "null", "--data.eval_envs", "1", "--trainer.callbacks", "null")


def run(command, threads, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def ours(recipe, frames, threads=1, *options):
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "lightning_hyper", "fit", "-c", recipe, "--frames", str(frames), *options]
        lines = run(command, threads, folder).splitlines()
    return float(re.search(r"([\d,]+) frames/s", lines[-1]).group(1).replace(",", ""))


def floor(method, frames):
    return float(run([str(HERE / "floor.py"), method, str(frames)], 1, HERE).split()[-1])


def peer(frames, threads):
    return float(run([str(HERE / "recurrent_ppo.py"), str(frames)], threads, HERE).split()[-1])


def show(name, a, b, rounds=3):
    pairs = [(a(), b()) for _ in range(rounds)]
    ratios = sorted(x / y for x, y in pairs)
    left, right = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"{name:52} {left:9,.0f} {right:9,.0f} {ratios[0]:6.2f} {ratios[rounds // 2]:6.2f} {ratios[-1]:6.2f}",
        flush=True,
    )


def first_update():
    """Seconds from the command to the end of the first batch, in a folder whose database is there already."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "lightning_hyper", "fit", "-c", "recurrent/gridnavi_rnn_hn", "--frames", "1"]
        quick = ["--data.eval_envs", "1", "--trainer.callbacks", "null"]
        run([*command, *quick], 1, folder)
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command, *quick], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        process.stdout.readline()
        seconds = time.perf_counter() - start
        process.communicate()
        return seconds


def seconds_of(*command):
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], capture_output=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    print("frames/s, median of 3 rounds, and the ratio A/B (least, median, largest)")
    print(f"{'':52} {'A':>9} {'B':>9}")
    frames = 920_000
    for method in ("rnn_hn", "rnn"):
        for what, options in (("all", ()), ("no evaluation", QUIET)):
            show(
                f"A {method}, {what}; B bare PyTorch loop",
                lambda m=method, o=options: ours(f"recurrent/gridnavi_{m}", frames, 1, *o),
                lambda m=method: floor(m, frames),
            )
    for threads in (1, 2):
        show(
            f"A plain RNN, 16 trials, paper sizes, {threads} thread; B RecurrentPPO",
            lambda t=threads: ours("recurrent/gridnavi_paper+recurrent/rnn", 48_000, t, "--model.partition", "windows"),
            lambda t=threads: peer(24_000, t),
        )
    print("RNN+HN, 16 trials, paper sizes: frames/s, median of 3")
    for embedding, threads, partition in itertools.product((25, 256), (1, 2), ("steps", "windows")):
        options = ("--model.partition", partition)
        wide = ("--model.encoder.widths", f"[{embedding}]")
        rates = [ours("recurrent/gridnavi_rnn_hn_paper", 19_200, threads, *options, *wide) for _ in range(3)]
        print(f"  state embedding {embedding:3}, {threads} thread(s), minibatches of {partition:6} "
              f"{statistics.median(rates):,.0f}", flush=True)  # fmt: skip
    print(f"seconds to the first update of `fit`: {statistics.median(first_update() for _ in range(3)):.1f}")
    print(f"seconds of `import lightning_hyper`: {seconds_of('-c', 'import lightning_hyper'):.2f}, of `--help`: "
          f"{seconds_of('-m', 'lightning_hyper', '--help'):.2f}, of `recipes`: "
          f"{seconds_of('-m', 'lightning_hyper', 'recipes'):.2f}")  # fmt: skip
