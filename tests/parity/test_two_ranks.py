"""Two ranks with n environments each learn what one rank with all of them learns."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_hyper.algorithms import PPO
from lightning_hyper.envs import GridNavi, MiniGrid, Trials
from lightning_hyper.experience import Collection, Rollouts
from lightning_hyper.modules import OneHotContext, RecurrentContext
from lightning_hyper.nn import GRU, MLP, GridEncoder, Hyper
from lightning_hyper.training.run import Run

ENVS, STEPS, BATCHES = 8, 20, 3


class Given(Rollouts):
    """The same experience for all: rank r of w gets every w-th environment of batches collected beforehand."""

    def connect(self, device="cpu", *, seed=0, rank=0, ranks=1):
        super().connect(device, seed=seed, rank=rank, ranks=ranks)
        self.env = self.make_env(num_envs=ENVS // ranks)

    def begin(self, policy, **_):
        env = self.make_env(num_envs=ENVS)
        env.set_seed(0)
        torch.manual_seed(7)
        whole = Collection(env, policy, STEPS, value=policy.value_of)
        self.given = iter([whole.collect()[self.rank :: self.ranks].clone() for _ in range(BATCHES)])

    def collect(self):
        return next(self.given)


def recurrent(partition, minibatches):
    network = partial(Hyper, hidden=[6])
    context = partial(RecurrentContext, encoder=partial(GRU, hidden=8), code=None)
    return PPO(
        context=context, actor=network, critic=network, minibatches=minibatches, partition=partition, lr=1e-2,
        normalize_observation=True, normalize_reward=True, normalize_advantage="batch",
    )  # fmt: skip


def tasks():
    head = partial(MLP, hidden=[8])
    return PPO(
        encoder=partial(GridEncoder, channels=(4, 4, 8)), actor=head, critic=head, context=OneHotContext,
        decision=partial(Hyper, hidden=[]), minibatches=1, lr=1e-2,
    )  # fmt: skip


KINDS = {
    "windows": (partial(recurrent, "windows", 1), partial(Trials, partial(GridNavi, episode_steps=10), episodes=2)),
    "steps": (partial(recurrent, "steps", 1), partial(Trials, partial(GridNavi, episode_steps=10), episodes=2)),
    "frames": (tasks, partial(MiniGrid, tasks=["MiniGrid-Empty-5x5-v0", "MiniGrid-Empty-Random-5x5-v0"], levels=4)),
}


def train(devices, kind, path):
    seed_everything(0, verbose=False)
    make, env = KINDS[kind]
    model = make()
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Run(ENVS * STEPS * BATCHES)],
    )  # fmt: skip
    data = Given(env, steps=STEPS, evaluate_every=None, eval_envs=4)
    trainer.fit(model, datamodule=data)
    if trainer.is_global_zero:
        torch.save({"state": model.state_dict(), "frames": model.clock.frames}, path)


@pytest.mark.parametrize("kind", KINDS)
def test_two_gloo_ranks_equal_one_rank_with_twice_the_environments(tmp_path, kind):
    results = []
    for devices in (1, 2):
        path = tmp_path / f"{devices}.pt"
        command = [sys.executable, __file__, str(devices), kind, str(path)]
        subprocess.run(
            command, check=True, timeout=180, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True
        )
        results.append(torch.load(path))
    one, two = results
    assert one["frames"] == two["frames"] == ENVS * BATCHES * STEPS
    for key, value in one["state"].items():
        torch.testing.assert_close(value, two["state"][key], atol=1e-5, rtol=1e-4)


if __name__ == "__main__":
    train(int(sys.argv[1]), sys.argv[2], sys.argv[3])
