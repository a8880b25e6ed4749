"""MiniGrid: small grid worlds seen from within, episodes of many tasks side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torchrl.data import Categorical

from lightning_hyper.checks import Count, RecipeError, checked
from lightning_hyper.envs.base import BatchedEnv
from lightning_hyper.envs.minigrid_batched import BatchedEngine
from lightning_hyper.envs.minigrid_package import ACTIONS, VIEW, Engine, PackageEngine, describe
from lightning_hyper.envs.minigrid_rules import covers

THREE = ("MiniGrid-LavaGapS7-v0", "MiniGrid-RedBlueDoors-6x6-v0", "MiniGrid-MemoryS11-v0")
# In the order of the paper's training script, which decides which tasks get an environment more.
SEVEN = (
    "MiniGrid-DoorKey-6x6-v0",
    "MiniGrid-DistShift1-v0",
    "MiniGrid-RedBlueDoors-6x6-v0",
    "MiniGrid-LavaGapS7-v0",
    "MiniGrid-MemoryS11-v0",
    "MiniGrid-SimpleCrossingS9N2-v0",
    "MiniGrid-MultiRoom-N2-S4-v0",
)
TWELVE = (
    *SEVEN,
    "MiniGrid-Empty-Random-6x6-v0",
    "MiniGrid-FourRooms-v0",
    "MiniGrid-Unlock-v0",
    "MiniGrid-KeyCorridorS3R1-v0",
    "MiniGrid-GoToDoor-6x6-v0",
)
SETS: dict[str, tuple[str, ...]] = {
    "three": THREE,
    # The paper does not name its five.
    "five": (*THREE, "MiniGrid-DoorKey-6x6-v0", "MiniGrid-SimpleCrossingS9N2-v0"),
    "seven": SEVEN,
    "twelve": TWELVE,
    "twenty": (
        *TWELVE,
        "MiniGrid-UnlockPickup-v0",
        "MiniGrid-LavaCrossingS9N1-v0",
        "MiniGrid-Fetch-5x5-N2-v0",
        "MiniGrid-GoToObject-6x6-N2-v0",
        "MiniGrid-RedBlueDoors-8x8-v0",
        "MiniGrid-MultiRoom-N4-S5-v1",
        "MiniGrid-BlockedUnlockPickup-v0",
        "MiniGrid-ObstructedMaze-1Dlh-v0",
    ),
}


def max_steps(task: str) -> int:
    """Frames after which an episode of the task with this id is truncated."""
    return describe(task).max_steps


class MiniGrid(BatchedEnv):
    """A batch of MiniGrid episodes of mixed tasks, to which environments are assigned in turn.

    Observations `[num_envs, 7, 7, 3]`, uint8, are the package's own images: kind, colour and state of each cell seen,
    by column and row. Seven actions: left, right, forward, pick up, drop, toggle, done. Levels are the package's own:
    level k of a task is its reset with a seed made from the environment's seed and k, made when it is first drawn.

    Args:
        num_envs: episodes stepped side by side, at least one for each task.
        tasks: a set of tasks (`three`, `five`, `seven`, `twelve`, `twenty`) or the package's ids. Three and seven are
            the paper's; it does not name its five, which here are the three, DoorKey and SimpleCrossing.
        absent: those of the tasks that no environment has, though an agent is made for them; see `--weights`.
        engine: `batched` steps all at once in tensors, `minigrid` the package's environments one by one; both give
            the same episodes.
        levels: levels of each task among which a reset draws.
        refresh: resets of a task after which the oldest of its levels gives way to a new one; null never.
        device: where the tensors live; the package steps on the CPU.

    It shows besides `direction`, `[num_envs]`, int64: where the agent looks, right, down, left or up. Each environment
    keeps its task; `tasks` are their ids, and each task has its own limit of frames.

    Raises:
        RecipeError: a task that is unknown or differs in shape, or a count out of range.

    Source: Chevalier-Boisvert et al. 2023 (arXiv 2306.13831), MiniGrid; sets after arXiv 2306.10698.
    """

    @checked
    def __init__(
        self,
        num_envs: Count = 16,
        *,
        tasks: str | Sequence[str] = "seven",
        absent: Sequence[str] = (),
        engine: Literal["batched", "minigrid"] = "batched",
        levels: Count = 4096,
        refresh: Count | None = None,
        device: str = "cpu",
    ) -> None:
        if isinstance(tasks, str) and tasks not in SETS:
            raise RecipeError(f"data.env.tasks is {tasks!r}; it must be one of {', '.join(SETS)}, or a list of ids")
        described = [describe(task) for task in (SETS[tasks] if isinstance(tasks, str) else tasks)]
        if not described or len(set(described)) < len(described):
            raise RecipeError(f"data.env.tasks is {list(tasks)}; it must list at least one id, and none of them twice")
        ids = [task.id for task in described]
        present = [k for k, task in enumerate(ids) if task not in absent]
        if len(present) != len(ids) - len(absent) or not present:
            raise RecipeError(
                f"data.env.absent is {list(absent)}; it must list some of data.env.tasks, which are {', '.join(ids)}"
            )
        if num_envs < len(present):
            raise RecipeError(
                f"data.env.num_envs is {num_envs}, but data.env.tasks lists {len(present)} that are not absent; each "
                f"needs an environment, so data.env.num_envs must be at least {len(present)}"
            )
        super().__init__(num_envs, device)
        # Levels do not depend on the device.
        self.generator = torch.Generator()
        self.tasks = tuple(ids)
        self.missions = tuple(task.missions for task in described)
        self.horizon = max(task.max_steps for task in described)
        self.levels, self.refresh = levels, refresh
        assigned = torch.tensor(present)[torch.arange(num_envs) % len(present)]
        self._task = assigned.to(self.device)
        self._resets = torch.zeros(len(described), dtype=torch.int64)
        limits = torch.tensor([task.max_steps for task in described])
        self._limits = limits[assigned].unsqueeze(1).to(self.device)
        unknown = [task.id for task in described if not covers(task)] if engine == "batched" else []
        if unknown:
            rank_zero_info(
                f"MiniGrid: the batched engine does not know the rules of {', '.join(unknown)}; all tasks are stepped "
                "as with data.env.engine minigrid, which is slower"
            )
        self.engine: Engine = (
            PackageEngine(described, assigned)
            if engine == "minigrid" or unknown
            else BatchedEngine(described, assigned, levels, self.device)
        )
        self.engine.seed = self.generator.initial_seed()
        self._make_specs(
            (VIEW, VIEW, 3),
            ACTIONS,
            dtype=torch.uint8,
            more={"direction": Categorical(4, shape=(num_envs,), device=self.device, dtype=torch.int64)},
        )

    def _set_seed(self, seed: int | None) -> None:
        super()._set_seed(seed)
        if seed is not None:
            self.engine.seed = seed

    def draw(self, rows: Tensor) -> Tensor:
        """Levels `[K]` for new episodes of the environments `rows` `[K]`, both on the CPU."""
        task = self.engine.task[rows]
        drawn = torch.randint(self.levels, (len(rows),), generator=self.generator)
        if self.refresh is not None:
            drawn += self._resets[task] // self.refresh
        self._resets += torch.bincount(task, minlength=len(self.tasks))
        return drawn

    def start(self, rows: Tensor) -> None:
        chosen = rows.nonzero().squeeze(1).cpu()
        self.engine.start(chosen, self.draw(chosen))

    def observation(self) -> Tensor:
        return self.engine.image.to(self.device)

    def simulate(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        reward, terminated, _ = self.engine.step(action)
        return self.observation(), reward.to(self.device), terminated.to(self.device)

    def truncated(self, step_count: Tensor) -> Tensor:
        return step_count >= self._limits

    def entries(self) -> dict[str, Tensor]:
        engine = self.engine
        return {
            "direction": engine.direction.to(self.device),
            "task": self._task,
            "mission": engine.mission.to(self.device),
        }

    def snapshot(self) -> dict[str, Any]:
        # What the engine is given as a seed may need more bits than a signed integer has.
        seed = torch.tensor([self.engine.seed % 2**64 >> 32, self.engine.seed % 2**32])
        return {"seed": seed, "resets": self._resets.clone(), **self.engine.save_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        high, low = state["seed"].tolist()
        self.engine.seed = (high << 32) + low
        self._resets = state["resets"].cpu().clone()
        self.engine.load_state(dict(state))
