"""Off-policy experience: collected frames go into a replay buffer, from which minibatches are owed for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import TensorSpec

from lightning_hyper.checks import Count, Range, RecipeError, Share, checked, require_memory
from lightning_hyper.envs import BatchedEnv
from lightning_hyper.experience.base import Experience
from lightning_hyper.experience.collection import Collection, Policy
from lightning_hyper.experience.replay_buffer import CompactReplayBuffer, Minibatch


class Replayed:  # no dataclass: Lightning would copy one at every batch
    """One batch of off-policy experience.

    Attributes:
        collected: the new frames, `[num_envs, time]`.
        updates: minibatches that are owed for them.
        batch_size: samples of a minibatch of this rank.
    """

    def __init__(self, collected: TensorDict, updates: int, batch_size: int, buffer: CompactReplayBuffer) -> None:
        self.collected, self.updates, self.batch_size, self._buffer = collected, updates, batch_size, buffer

    def blocks(self) -> Iterator[Minibatch]:
        """The minibatches that are owed, many in a block, as `CompactReplayBuffer.blocks` lays them out."""
        return self._buffer.blocks(self.updates, self.batch_size)

    def frames(self) -> dict[str, Tensor]:
        """Observations and rewards of all frames that minibatches come from."""
        return self._buffer.held("observation", "reward")

    def prioritize(self, minibatch: Minibatch, error: Tensor) -> None:
        """Tell how large the error of each sample is, `[size]`; it matters where sampling is prioritised."""
        if "index" in minibatch:
            self._buffer.prioritize(minibatch["index"], error)


class Replay(Experience[Replayed]):
    """Collects `steps` frames from each environment per batch into a replay buffer, and hands out minibatches.

    Nothing is learned during the first `warmup_frames`, whose actions are uniformly random. Where the policy carries a
    memory, a sample is a window of consecutive frames, and begins with the memory that the policy had there (the
    "stored state" of R2D2, Kapturowski et al. 2019).

    Args:
        env: makes the environment; its size `num_envs` is that of each rank.
        steps: frames of each environment in a batch.
        capacity: frames that the buffer of each rank holds; the oldest make room.
        batch_size: samples of a minibatch, all ranks together.
        sequence: consecutive frames of a sample; more than 1 for policies with a memory, and only for them.
        warmup_frames: frames of random actions before the first update, all ranks together.
        updates_per_frame: updates owed for each frame after that.
        n_step: rewards that a target adds up before it bootstraps.
        prioritized: exponents [alpha, beta] of prioritised sampling; null samples uniformly.
        storage: keep frames in `memory`, or memory-mapped in files (`memmap`) under the run's folder.
        options: as in `Experience`.
    """

    @checked
    def __init__(
        self,
        env: Callable[[], BatchedEnv],
        *,
        steps: Count = 1,
        capacity: Annotated[int, Range(1, 10**9)] = 1_000_000,
        batch_size: Count = 256,
        sequence: Count = 1,
        warmup_frames: Annotated[int, Range(0, 10**9)] = 1_000,
        updates_per_frame: Annotated[float, Range(0, 1_000, above=True)] = 1.0,
        n_step: Annotated[int, Range(1, 10_000)] = 1,
        prioritized: Sequence[Share] | None = None,
        storage: Literal["memory", "memmap"] = "memory",
        **options: Any,
    ) -> None:
        super().__init__(env, **options)
        if capacity < batch_size:
            raise RecipeError(f"data.capacity is {capacity}; it must be at least data.batch_size, {batch_size}")
        if prioritized is not None and len(prioritized) != 2:
            raise RecipeError(f"data.prioritized is {list(prioritized)}; it must be [alpha, beta], both in [0, 1]")
        if sequence > 1 and (n_step > 1 or prioritized is not None):
            other = "data.prioritized" if n_step == 1 else f"data.n_step {n_step}"
            raise RecipeError(f"data.sequence is {sequence}; windows do not go with {other}, leave one of the two out")
        self._steps, self.capacity, self.batch_size, self.sequence = steps, capacity, batch_size, sequence
        self.warmup_frames, self.updates_per_frame, self.n_step = warmup_frames, updates_per_frame, n_step
        self.prioritized = None if prioritized is None else (prioritized[0], prioritized[1])
        self.storage = storage
        self.frames = 0  # collected, all ranks together

    @property
    def steps(self) -> int:
        """Frames of each environment in a batch."""
        return self._steps

    def begin(self, policy: Any, *, folder: Path | None = None, budget: int | None = None) -> None:
        self._require_sizes(policy, budget)
        self._actor = WarmUp(policy, self.env.action_spec)
        self.collection = Collection(self.env, self._actor, self._steps, keep_states=policy.state_features > 0)
        # Twice: of each frame, what is shown before and after.
        batch = 2 * self.env.batch_size.numel() * self._steps
        require_memory("data.env.num_envs times data.steps", batch * self.env.frame_bytes)
        memmap = None
        if self.storage == "memmap":
            if folder is None:
                raise RecipeError("data.storage is memmap, which needs the folder of a run; choose memory")
            memmap = folder / "frames" / f"rank-{self.rank}"
        self.buffer = CompactReplayBuffer(
            self.capacity,
            self.env.batch_size.numel(),
            {key: self.env.observation_spec[key].zero()[0] for key in policy.window_keys},
            self.env.action_spec.zero()[0],
            state_features=policy.state_features,
            n_step=self.n_step,
            sequence=self.sequence,
            prioritized=self.prioritized,
            device=self.env.device,
            memmap=memmap,
        )
        frames, size = self.buffer.capacity, self.buffer.frame_bytes
        rank_zero_info(f"Replay buffer: {frames:,} frames of {size} bytes, {frames * size / 2**20:,.0f} MiB when full")

    def _require_sizes(self, policy: Any, budget: int | None) -> None:
        envs = self.env.batch_size.numel()
        if self.batch_size % self.ranks:
            raise RecipeError(
                f"data.batch_size is {self.batch_size}, which {self.ranks} ranks cannot share; choose a multiple of "
                f"{self.ranks}"
            )
        if (together := envs * self._steps) > self.capacity:
            raise RecipeError(
                f"data.capacity is {self.capacity}, less than the {together} frames that are collected at once"
            )
        if budget is not None and self.warmup_frames >= budget:
            raise RecipeError(
                f"data.warmup_frames is {self.warmup_frames:,} and frames only {budget:,}: nothing would be learned"
            )
        if policy.state_features and self.sequence == 1:
            raise RecipeError(
                "data.sequence is 1, but model.context carries a memory, which is learned over windows of frames; "
                "choose more, such as 20"
            )
        if self.sequence > 1 and not policy.state_features:
            raise RecipeError(
                f"data.sequence is {self.sequence}, but no model.context carries a memory; leave it out to learn from "
                "single frames"
            )
        least = self.sequence * envs
        if self.sequence > 1 and (self.capacity < least or self.warmup_frames < least * self.ranks):
            raise RecipeError(
                f"data.sequence is {self.sequence}: data.capacity must be at least {least} and data.warmup_frames "
                f"{least * self.ranks}, so that each of the {envs} environments has a window to learn from"
            )

    def collect(self) -> Replayed:
        assert self.collection is not None
        self._actor.active = self.frames < self.warmup_frames
        collected = self.collection.collect()
        self.buffer.extend(collected)
        paid = self._updates_by(self.frames)
        self.frames += collected["next", "done"].numel() * self.ranks
        return Replayed(collected, self._updates_by(self.frames) - paid, self.batch_size // self.ranks, self.buffer)

    def _updates_by(self, frames: int) -> int:
        """Updates that are owed for so many frames."""
        return int(max(0, frames - self.warmup_frames) * self.updates_per_frame + 1e-6)

    def save_state(self) -> dict[str, Any]:
        state = super().save_state()
        return {**state, "frames": self.frames} if state else {}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.frames = state["frames"]

    def save_buffer(self, folder: Path) -> bool:
        if self.collection is None:
            return False
        folder.mkdir(parents=True, exist_ok=True)
        self.buffer.save(folder)
        return True

    def load_buffer(self, folder: Path) -> None:
        self.buffer.load(folder, self.frames // self.ranks)


class WarmUp:
    """A policy that acts uniformly at random as long as `active`, and then as it is.

    Args:
        policy: acts afterwards; where it carries a state, it sees all that happens before.
        action_spec: bounds of the random actions.
    """

    def __init__(self, policy: Policy, action_spec: TensorSpec) -> None:
        self._policy, self._spec = policy, action_spec
        self.active = False

    def act(self, step: Any, state: Tensor | None) -> tuple[dict[str, Tensor], Tensor | None]:
        chosen, state = self._policy.act(step, state)
        return {**chosen, "action": self._spec.rand()} if self.active else chosen, state
