"""Batched environments. Each steps many trials at once and speaks tensordict.

A trial is `episodes` episodes of one task. Every environment here gives these entries, `[num_envs, ...]`, at each step:

- `observation` `[*, features]`: what the task's Markov decision process shows;
- `episode_done` `[*, 1]`: 1.0 where the last step ended an inner episode;
- `previous_action`, `previous_reward`: what led here, zero at the start of a trial;
- `is_init` `[*, 1]`: true at the first step of a trial, where memory begins afresh;
- `episode` `[*, 1]`: index of the current episode within the trial;
- `task` `[*, task_features]`: the task's description, for oracle policies only;

and `done` only at the end of a trial. Hidden state crosses inner episodes, never trials.
"""

from lightning_hyper.envs.base import TrialEnv
from lightning_hyper.envs.gridnavi import GridNavi

__all__ = ["GridNavi", "TrialEnv"]
