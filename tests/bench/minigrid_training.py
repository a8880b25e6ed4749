"""Multi-task PPO on MiniGrid end to end, by the command line with checkpoints and MLflow, over Stable-Baselines3; and
what the episodic memory costs.

Each pair of commands runs in turn, so that a ratio holds when the machine's speed drifts.
"""

from gridnavi_training import HERE, QUIET, ours, run, show

FRAMES = 81_920
ENGINE = "--data.env.engine"


def trained(recipe, *options, frames=FRAMES):
    return ours("+".join(f"retrieval/{part}" for part in recipe.split("+")), frames, 1, *QUIET, *options)


def peer(frames=FRAMES // 2):
    printed = run([str(HERE / "ppo_peer.py"), "MiniGrid-DoorKey-6x6-v0", "0", str(frames)], 1, HERE)
    return float(printed.splitlines()[0].split()[-1])


if __name__ == "__main__":
    print("frames/s, one thread, median of 3 rounds, and the ratio A/B (least, median, largest)")
    print(f"{'':52} {'A':>9} {'B':>9}")
    for engine in ("minigrid", "batched"):
        show(
            f"A PPO, DoorKey, 16 x 128, engine {engine}; B SB3",
            lambda e=engine: trained("doorkey_ppo", ENGINE, e),
            peer,
        )
    wide = ("--data.env.num_envs", "64", "--data.steps", "32")
    show("A PPO, DoorKey, 64 x 32, engine batched; B SB3, 16 x 128", lambda: trained("doorkey_ppo", *wide), peer)
    several = [("MPPO", "seven+mppo"), ("PPOHypernet", "seven+ppo_hypernet")]
    for name, recipe in several:
        show(
            f"A retrieval, 7 tasks, 50 memories; B {name}",
            lambda: trained("seven+retrieval"),
            lambda r=recipe: trained(r),
        )
    for size in (1_000, 10_000):
        show(
            f"A retrieval, 7 tasks, all of {size:,} memories; B PPOHypernet",
            lambda s=size: trained(f"seven+retrieval+ablations/memory{s}"),
            lambda: trained("seven+ppo_hypernet"),
        )
    published = trained("seven+retrieval_published")
    times = f"{published / 43.5:.0f} times the 43.5 that the published code reached on another machine"
    print(f"retrieval as published, 16 x 128: {published:,.0f} frames/s, {times}")
