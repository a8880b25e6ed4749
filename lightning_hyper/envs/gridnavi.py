"""GridNavi: find an unseen goal in a small grid, then return to it in every later episode of the trial."""

from __future__ import annotations

from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Categorical, Composite, Unbounded

from lightning_hyper.envs.base import TrialEnv


class GridNavi(TrialEnv):
    """A batch of grid-world trials: `episodes` episodes of `episode_steps` steps with one hidden goal each.

    The agent starts every episode in the corner (0, 0); the goal is uniform over the cells outside the start's 3x3
    neighbourhood. Actions: stay, up, right, down, left. The observation is the cell (x, y), unscaled; at the end of
    an inner episode it is still the last cell, with `episode_done` = 1, and the next move starts from the corner.
    A trial ends by termination: its horizon is part of the task.

    Args:
        num_envs: trials stepped side by side.
        episodes: episodes of a trial.
        episode_steps: steps (frames) of an episode.
        size: cells along a side, at least 3.
        reward: `sparse` gives +1 on the goal and -0.1 elsewhere; `dense` gives minus the Manhattan distance over
            `size` elsewhere.
        show_goal: `never`; `episode_start` shows the goal's cell in place of the agent's at the first step of every
            episode (as the paper describes it); `start_cell` does so whenever a step ends on the start cell
            (as the published code does it).
        device: where the tensors live.

    Raises:
        ValueError: a size, count or name out of range.

    Source: Beck et al. 2023 (arXiv 2309.14970), grid worlds; after Zintgraf et al. 2020 (VariBAD).
    """

    MOVES = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))

    def __init__(
        self,
        num_envs: int = 256,
        *,
        episodes: int = 4,
        episode_steps: int = 15,
        size: int = 5,
        reward: Literal["sparse", "dense"] = "sparse",
        show_goal: Literal["never", "episode_start", "start_cell"] = "never",
        device: str = "cpu",
    ) -> None:
        for key, value, least in (
            ("episodes", episodes, 1),
            ("episode_steps", episode_steps, 1),
            ("size", size, 3),
        ):
            if value < least:
                raise ValueError(f"GridNavi: {key} is {value}; it must be at least {least}")
        if reward not in ("sparse", "dense"):
            raise ValueError(f"GridNavi: reward is {reward!r}; it must be 'sparse' or 'dense'")
        if show_goal not in ("never", "episode_start", "start_cell"):
            raise ValueError(f"GridNavi: show_goal is {show_goal!r}; choose 'never', 'episode_start' or 'start_cell'")
        super().__init__(num_envs, device)
        self.episodes, self.episode_steps, self.size = episodes, episode_steps, size
        self.reward, self.show_goal = reward, show_goal
        self.horizon = episodes * episode_steps
        self._moves = torch.tensor(self.MOVES, device=self.device)
        self.goals = torch.tensor(
            [(x, y) for x in range(size) for y in range(size) if x > 1 or y > 1], device=self.device
        )
        self._make_specs(num_envs)

    def _make_specs(self, n: int) -> None:
        def real(features: int) -> Unbounded:
            return Unbounded((n, features), device=self.device, dtype=torch.float32)

        def count() -> Unbounded:
            return Unbounded((n, 1), device=self.device, dtype=torch.int64)

        def flag() -> Binary:
            return Binary(1, (n, 1), device=self.device, dtype=torch.bool)

        self.action_spec = Categorical(len(self.MOVES), shape=(n,), device=self.device)
        self.reward_spec = real(1)
        self.full_done_spec = Composite(done=flag(), terminated=flag(), shape=(n,))
        self.observation_spec = Composite(
            observation=real(2),
            episode_done=real(1),
            previous_action=Categorical(len(self.MOVES), shape=(n,), device=self.device),
            previous_reward=real(1),
            is_init=flag(),
            episode=count(),
            task=real(2),
            position=Unbounded((n, 2), device=self.device, dtype=torch.int64),
            step_count=count(),
            shape=(n,),
        )

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        n = self.batch_size[0]
        chosen = torch.randint(len(self.goals), (n,), generator=self.generator, device=self.device)
        goal = self.goals[chosen].float()
        zero = torch.zeros(n, 1, device=self.device)
        count = torch.zeros(n, 1, device=self.device, dtype=torch.int64)
        position = count.expand(n, 2).clone()
        entries = {
            "observation": goal if self.show_goal == "episode_start" else position.float(),
            "episode_done": zero,
            "previous_action": count[:, 0],
            "previous_reward": zero,
            "is_init": torch.ones_like(zero, dtype=torch.bool),
            "episode": count,
            "task": goal,
            "position": position,
            "step_count": count,
        }
        return TensorDict(entries, batch_size=self.batch_size, device=self.device)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action, goal = tensordict.get("action"), tensordict.get("task")
        position = (tensordict.get("position") + self._moves[action]).clamp_(0, self.size - 1)
        cell = position.float()
        distance = (cell - goal).abs_().sum(-1, keepdim=True)
        miss = -distance / self.size if self.reward == "dense" else -0.1
        reward = torch.where(distance == 0, 1.0, miss)
        steps = tensordict.get("step_count") + 1
        episode_over = steps % self.episode_steps == 0
        done = steps >= self.horizon
        entries = {
            "observation": self._shown(cell, goal, episode_over),
            "episode_done": episode_over.float(),
            "previous_action": action,
            "previous_reward": reward,
            "is_init": torch.zeros_like(done),
            "episode": steps.div(self.episode_steps, rounding_mode="floor"),
            "task": goal,
            "position": position * ~episode_over,
            "step_count": steps,
            "reward": reward,
            "done": done,
            "terminated": done,
        }
        return TensorDict(entries, batch_size=self.batch_size, device=self.device)

    def _shown(self, cell: Tensor, goal: Tensor, episode_over: Tensor) -> Tensor:
        if self.show_goal == "never":
            return cell
        reveal = episode_over if self.show_goal == "episode_start" else (cell == 0).all(-1, keepdim=True)
        return torch.where(reveal, goal, cell)
