"""Two ranks with n environments each learn what one rank with 2n environments learns."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything

from lightning_hyper.algorithms import MetaPPO
from lightning_hyper.envs import GridNavi
from lightning_hyper.experience.trials import Rollouts
from lightning_hyper.modules import MetaAgent, RecurrentContext, Spaces
from lightning_hyper.nn import GRU, Hyper
from lightning_hyper.training.clock import FrameBudget

ENVS, BATCHES = 8, 3


def algorithm(reencode):
    network = partial(Hyper, hidden=[6])
    context = partial(RecurrentContext, encoder=partial(GRU, hidden=8), code=None)
    return MetaPPO(
        context=context, actor=network, critic=network, minibatches=1, partition="steps", reencode=reencode, lr=1e-2
    )


class Given(LightningDataModule):
    """The same experience for all: rank r of w gets every w-th environment of prepared batches."""

    steps = 20

    def setup(self, stage):
        self.env = GridNavi(ENVS // self.trainer.world_size, episodes=2, episode_steps=10)

    def train_dataloader(self):
        env = GridNavi(ENVS, episodes=2, episode_steps=10)
        env.set_seed(0)
        agent = MetaAgent(
            Spaces.of(env), **{k: getattr(algorithm("minibatch"), k) for k in ("context", "actor", "critic")}
        )
        torch.manual_seed(7)
        rollouts = Rollouts(env, agent, 20, BATCHES)
        rank, world = self.trainer.global_rank, self.trainer.world_size
        return Listed([batch[rank::world].clone() for batch in rollouts])


class Listed:
    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def train(devices, reencode, path):
    seed_everything(0, verbose=False)
    model = algorithm(reencode)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        callbacks=[FrameBudget(10**6)],
    )  # fmt: skip
    trainer.fit(model, datamodule=Given())
    if trainer.is_global_zero:
        torch.save({"state": model.state_dict(), "frames": model.clock.frames}, path)


@pytest.mark.parametrize("reencode", ["minibatch", "epoch"])
def test_two_gloo_ranks_equal_one_rank_with_twice_the_environments(tmp_path, reencode):
    results = []
    for devices in (1, 2):
        path = tmp_path / f"{devices}.pt"
        command = [sys.executable, __file__, str(devices), reencode, str(path)]
        subprocess.run(
            command, check=True, timeout=180, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True
        )
        results.append(torch.load(path))
    one, two = results
    assert one["frames"] == two["frames"] == ENVS * 20 * BATCHES
    for key, value in one["state"].items():
        torch.testing.assert_close(value, two["state"][key], atol=1e-5, rtol=1e-4)


if __name__ == "__main__":
    train(int(sys.argv[1]), sys.argv[2], sys.argv[3])
