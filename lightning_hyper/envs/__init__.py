"""Batched environments. Each steps many episodes at once and speaks tensordict.

Every environment here gives these entries, `[num_envs, ...]`, at each step:

- `observation` `[*, features]`, float32 (an image in MiniGrid): what the task's Markov decision process shows;
- `is_init` `[*, 1]`: true at the first step after a reset;
- `done`, `terminated`, `truncated` where the horizon is not part of the task; `reward` `[*, 1]`.

A `TrialEnv` steps trials, `episodes` episodes of one task each, and gives besides:

- `episode_done` `[*, 1]`: 1.0 where the last step ended an inner episode;
- `previous_action`, `previous_reward`: what led here, zero at the start of a trial;
- `episode` `[*, 1]`: index of the current episode within the trial;
- `task` `[*, task_features]`: the task's description, for oracle policies only;

and `done` only at the end of a trial. Hidden state crosses inner episodes, never trials. Other environments may be
stepped beyond `done`, as an evaluation does until the last episode ends, and give

- `step_count` `[*, 1]`, `episode_return` `[*, 1]`: frames and undiscounted reward since the reset.

`MiniGrid` gives besides, `[*]`, int64:

- `direction`: where the agent looks, right, down, left or up;
- `task`: index of the environment's task in `tasks`;
- `mission`: index of the episode's text in `missions`, counted through all tasks.
"""

from lightning_hyper.envs.base import BatchedEnv, EpisodeEnv, TrialEnv
from lightning_hyper.envs.gridnavi import GridNavi
from lightning_hyper.envs.minigrid import MiniGrid
from lightning_hyper.envs.mujoco import (
    Ant,
    HalfCheetah,
    Hopper,
    InvertedDoublePendulum,
    InvertedPendulum,
    MuJoCo,
    Reacher,
    Walker2d,
)
from lightning_hyper.envs.pendulum import Pendulum

__all__ = [
    "Ant",
    "BatchedEnv",
    "EpisodeEnv",
    "GridNavi",
    "HalfCheetah",
    "Hopper",
    "InvertedDoublePendulum",
    "InvertedPendulum",
    "MiniGrid",
    "MuJoCo",
    "Pendulum",
    "Reacher",
    "TrialEnv",
    "Walker2d",
]
