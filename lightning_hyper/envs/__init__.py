"""Batched environments, which step many episodes at once; `keys` lists what they show, `base` what they do."""

from lightning_hyper.envs.base import BatchedEnv
from lightning_hyper.envs.gridnavi import GridNavi
from lightning_hyper.envs.gym import Gym
from lightning_hyper.envs.keys import Step
from lightning_hyper.envs.mine_maze import MineMaze
from lightning_hyper.envs.minigrid import MiniGrid
from lightning_hyper.envs.mujoco import MuJoCo
from lightning_hyper.envs.mujoco_families import (
    Ant,
    HalfCheetah,
    Hopper,
    InvertedDoublePendulum,
    InvertedPendulum,
    Reacher,
    Walker2d,
)
from lightning_hyper.envs.pendulum import Pendulum
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.envs.t_maze import TMaze
from lightning_hyper.envs.trials import Trials

__all__ = [
    "Ant",
    "BatchedEnv",
    "GridNavi",
    "Gym",
    "HalfCheetah",
    "Hopper",
    "InvertedDoublePendulum",
    "InvertedPendulum",
    "MineMaze",
    "MiniGrid",
    "MuJoCo",
    "Pendulum",
    "Reacher",
    "Spaces",
    "Step",
    "TMaze",
    "Trials",
    "Walker2d",
]
