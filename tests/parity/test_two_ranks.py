"""Two ranks with n environments (or half a minibatch) each learn what one rank with all of them learns."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything

from lightning_hyper.algorithms import PPO, TD3, MetaPPO
from lightning_hyper.envs import GridNavi, InvertedPendulum, MiniGrid
from lightning_hyper.experience.replay import Replayed
from lightning_hyper.experience.rollouts import Rollouts
from lightning_hyper.modules import MetaAgent, RecurrentContext, Spaces
from lightning_hyper.modules.task import OneHotTask
from lightning_hyper.nn import GRU, MLP, GridEncoder, Hyper, ResidualTrunk
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


class GivenEpisodes(LightningDataModule):
    """As `Given`, of MiniGrid tasks."""

    steps = 20

    def setup(self, stage):
        self.env = minigrid(ENVS // self.trainer.world_size)

    def train_dataloader(self):
        env, model = minigrid(ENVS), ppo()
        env.set_seed(0)
        model.build(Spaces.of(env))
        torch.manual_seed(7)
        rollouts = Rollouts(env, model.policy, 20, BATCHES)
        rank, world = self.trainer.global_rank, self.trainer.world_size
        return Listed([batch[rank::world].clone() for batch in rollouts])


class GivenReplay(LightningDataModule):
    """The same minibatches for all: rank r of w gets every w-th frame of each."""

    steps = 10

    def setup(self, stage):
        self.env = InvertedPendulum(ENVS // self.trainer.world_size)

    def train_dataloader(self):
        rank, world = self.trainer.global_rank, self.trainer.world_size
        pick = torch.Generator().manual_seed(7)
        collected = InvertedPendulum(ENVS).rollout(10, break_when_any_done=False)
        batches = []
        for _ in range(BATCHES):
            drawn = [self.minibatch(pick) for _ in range(5)]
            mine = [{key: entry[rank::world] for key, entry in minibatch.items()} for minibatch in drawn]
            own = collected[rank::world]
            batches.append(Replayed(own, len(mine), lambda seen, mine=mine: map(seen, mine), None))
        return Listed(batches)

    @staticmethod
    def minibatch(pick):
        def normal(*shape):
            return torch.randn(*shape, generator=pick)

        return {
            "observation": normal(12, 4),
            "action": normal(12, 1).clamp(-3, 3),
            "reward": normal(12, 1),
            "steps": torch.ones(12, dtype=torch.int64),
            "next_observation": normal(12, 4),
            "terminated": normal(12) > 1,
        }


class Listed:
    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def td3():
    trunk = partial(ResidualTrunk, widths=(8,), blocks=1)
    critic = partial(Hyper, hidden=[8], activation="relu", gain=True, init="sarafian", trunk=trunk)
    return TD3(actor=partial(MLP, hidden=[8]), critic=critic, shared_trunk=True, target_noise=0.0, critic_lr=1e-2)


def minigrid(num_envs):
    return MiniGrid(num_envs, tasks=["MiniGrid-Empty-5x5-v0", "MiniGrid-Empty-Random-5x5-v0"], levels=4)


def ppo():
    head = partial(MLP, hidden=[8], activation="tanh")
    return PPO(
        encoder=partial(GridEncoder, channels=(4, 4, 8)), actor=head, critic=head, task=OneHotTask,
        decision=partial(Hyper, hidden=[]), minibatches=1, normalize_advantage="minibatch", lr=1e-2,
    )  # fmt: skip


def train(devices, kind, path):
    seed_everything(0, verbose=False)
    model = {"td3": td3, "ppo": ppo}[kind]() if kind in ("td3", "ppo") else algorithm(kind)
    data = {"td3": GivenReplay, "ppo": GivenEpisodes}.get(kind, Given)()
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        callbacks=[FrameBudget(10**6)],
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    if trainer.is_global_zero:
        torch.save({"state": model.state_dict(), "frames": model.clock.frames}, path)


@pytest.mark.parametrize("kind", ["minibatch", "epoch", "td3", "ppo"])
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
    assert one["frames"] == two["frames"] == ENVS * BATCHES * (10 if kind == "td3" else 20)
    for key, value in one["state"].items():
        torch.testing.assert_close(value, two["state"][key], atol=1e-5, rtol=1e-4)


if __name__ == "__main__":
    train(int(sys.argv[1]), sys.argv[2], sys.argv[3])
