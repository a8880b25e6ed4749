"""Peak resident memory of TD3 on HalfCheetah with a full buffer of a million frames, over Stable-Baselines3's.

Only the last 1,000 frames have updates; ours writes the buffer beside its checkpoint at the end.
"""

import os
import subprocess
import sys
import tempfile

FRAMES, UPDATES = 1_000_000, 1_000
PEER = f"""
import gymnasium, warnings
from stable_baselines3 import TD3
warnings.simplefilter("ignore")
env = gymnasium.make("HalfCheetah-v5")
sizes = dict(buffer_size={FRAMES}, learning_starts={FRAMES - UPDATES}, batch_size=256, train_freq=1)
TD3("MlpPolicy", env, policy_kwargs=dict(net_arch=[256, 256]), device="cpu", **sizes).learn({FRAMES})
"""


def peak(*command):
    """Mebibytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen([sys.executable, *command], cwd=folder, env=environment, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command} failed")
    return used.ru_maxrss / 1024


if __name__ == "__main__":
    ours = ["-m", "lightning_hyper", "fit", "-c", "building_blocks/halfcheetah_td3", "--frames", str(FRAMES)]
    data = {"batch_size": 256, "warmup_frames": FRAMES - UPDATES, "steps": 1_000, "evaluate_every": "null"}
    ours += [part for key, value in data.items() for part in (f"--data.{key}", str(value))]
    ours += ["--trainer.callbacks", "null"]
    print("peak resident memory, MiB: start of Python with PyTorch, ours, Stable-Baselines3")
    print(*(f"{peak(*command):9,.0f}" for command in (["-c", "import torch"], ours, ["-c", PEER])))
