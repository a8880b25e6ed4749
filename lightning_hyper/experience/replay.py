"""Off-policy experience: collected frames go into a replay buffer, and minibatches drawn from it come with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import Bounded

from lightning_hyper.envs import BatchedEnv, EpisodeEnv
from lightning_hyper.experience.base import Collection, Experience
from lightning_hyper.experience.replay_buffer import CompactReplayBuffer, Minibatch, Seen
from lightning_hyper.modules import ReturnScale


@dataclass
class Replayed:
    """One Lightning batch of off-policy experience.

    Attributes:
        collected: the new frames, `[num_envs, time]`.
        updates: updates that are owed for them.
        minibatches: draws one minibatch for each, when it is asked for; its argument is applied to what is drawn (see
            `CompactReplayBuffer.minibatches`).
        prioritize: takes (index, error) of a minibatch; None where sampling is uniform.
    """

    collected: TensorDict
    updates: int
    minibatches: Callable[[Seen], Iterator[Minibatch]]
    prioritize: Callable[[Tensor, Tensor], None] | None


class Replay(Experience):
    """Collects `steps` frames from each environment per batch into a replay buffer, and hands out minibatches.

    Nothing is learned during the first `warmup_frames`, whose actions are uniformly random.

    Args:
        env: makes the environment; its size `num_envs` is that of each rank.
        steps: frames of each environment in a batch.
        capacity: frames that the buffer of each rank holds; the oldest make room.
        batch_size: frames of a minibatch, all ranks together.
        warmup_frames: frames of random actions before the first update, all ranks together.
        updates_per_frame: updates owed for each frame after that.
        n_step: rewards that a target adds up before it bootstraps.
        prioritized: exponents [alpha, beta] of prioritised sampling; null samples uniformly.
        storage: keep frames in `memory`, or memory-mapped in files (`memmap`) under the run's folder.
        buffer_device: where the frames live; null for the device that trains.
        reward_discount: divide sampled rewards by the running deviation of the return with this discount; null leaves
            them as they are.
    """

    def __init__(
        self,
        env: Callable[[], BatchedEnv],
        *,
        steps: int = 1,
        capacity: int = 1_000_000,
        batch_size: int = 256,
        warmup_frames: int = 1_000,
        updates_per_frame: float = 1.0,
        n_step: int = 1,
        prioritized: Sequence[float] | None = None,
        storage: Literal["memory", "memmap"] = "memory",
        buffer_device: str | None = None,
        reward_discount: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(env, **options)
        counts = {"steps": steps, "capacity": capacity, "batch_size": batch_size, "n_step": n_step}
        for key, value in counts.items():
            if value < 1:
                raise ValueError(f"data.{key} is {value}; it must be at least 1")
        if warmup_frames < 0:
            raise ValueError(f"data.warmup_frames is {warmup_frames}; it must not be negative")
        if updates_per_frame <= 0:
            raise ValueError(f"data.updates_per_frame is {updates_per_frame}; it must be positive")
        if capacity < batch_size:
            raise ValueError(
                f"data.capacity is {capacity}, less than data.batch_size {batch_size}; choose a larger one"
            )
        if prioritized is not None and (len(prioritized) != 2 or not all(0 <= x <= 1 for x in prioritized)):
            raise ValueError(f"data.prioritized is {list(prioritized)}; it must be [alpha, beta], both in [0, 1]")
        if storage not in ("memory", "memmap"):
            raise ValueError(f"data.storage is {storage!r}; it must be 'memory' or 'memmap'")
        if reward_discount is not None and not 0 <= reward_discount < 1:
            raise ValueError(f"data.reward_discount is {reward_discount}; it must lie in [0, 1), or be null")
        self._steps, self.capacity, self.batch_size = steps, capacity, batch_size
        self.warmup_frames, self.updates_per_frame, self.n_step = warmup_frames, updates_per_frame, n_step
        self.prioritized = None if prioritized is None else (prioritized[0], prioritized[1])
        self.storage, self.buffer_device = storage, buffer_device
        self.reward_scale = None if reward_discount is None else ReturnScale(reward_discount, carry=True)
        self._restored_buffer: Path | None = None

    @property
    def steps(self) -> int:
        """Frames of each environment in a batch."""
        return self._steps

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if not isinstance(self.env, EpisodeEnv):
            raise ValueError(
                f"data.env: {type(self.env).__name__} steps trials; Replay takes environments of one task, such as "
                "HalfCheetah"
            )
        assert self.trainer is not None
        ranks = self.trainer.world_size
        if self.batch_size % ranks:
            raise ValueError(
                f"data.batch_size is {self.batch_size}, which {ranks} ranks cannot share; choose a multiple of {ranks}"
            )
        together = self.env.batch_size.numel() * self._steps
        if together > self.capacity:
            raise ValueError(
                f"data.capacity is {self.capacity}, less than the {together} frames that are collected at once"
            )

    def train_dataloader(self) -> ReplayedFrames:
        assert self.trainer is not None
        budget = cast(Any, self.trainer.lightning_module).clock.budget
        if budget is not None and self.warmup_frames >= budget:
            raise ValueError(
                f"data.warmup_frames is {self.warmup_frames:,} and frames only {budget:,}: nothing would be learned"
            )
        return cast(ReplayedFrames, super().train_dataloader())

    def begin(self, restored: dict[str, Any] | None) -> ReplayedFrames:
        assert self.trainer is not None
        device = self.buffer_device or str(self.env.device)
        folder = None
        if self.storage == "memmap":
            folder = Path(self.trainer.default_root_dir) / "frames" / f"rank-{self.trainer.global_rank}"
            folder.mkdir(parents=True, exist_ok=True)
        buffer = CompactReplayBuffer(
            self.capacity,
            self.env.batch_size.numel(),
            n_step=self.n_step,
            prioritized=self.prioritized,
            device=device,
            memmap=folder,
        )
        frames = ReplayedFrames(
            Collection(self.env, WarmUp(self.policy, self.env.action_spec), self._steps),
            buffer,
            ranks=self.trainer.world_size,
            batches=self.batches_per_epoch,
            batch_size=self.batch_size // self.trainer.world_size,
            warmup_frames=self.warmup_frames,
            updates_per_frame=self.updates_per_frame,
            reward_scale=self.reward_scale,
        )
        size = self._row().bytes()
        where = "memory-mapped files" if folder is not None else "GPU memory" if device.startswith("cuda") else "RAM"
        rank_zero_info(
            f"Replay buffer: {buffer.capacity:,} frames of {size} bytes, {buffer.capacity * size / 2**20:,.0f} MiB "
            f"in {where} when full"
        )
        if restored is not None:
            frames.load_state_dict(restored)
            assert self._restored_buffer is not None
            buffer.load(self._restored_buffer, self._row())
        return frames

    def _row(self) -> TensorDict:
        carried = self.env.fake_tensordict()
        first = (0,) * self.env.batch_dims
        return CompactReplayBuffer.row(carried["observation"][first], carried["action"][first])

    def save_buffer(self, folder: Path) -> bool:
        if self._source is None:
            return False
        folder.mkdir(parents=True, exist_ok=True)
        self._source.buffer.save(folder)
        return True

    def restore_buffer(self, folder: Path) -> None:
        self._restored_buffer = folder


class WarmUp(TensorDictModuleBase):
    """A policy that acts uniformly at random as long as `active`, and then as it is.

    Args:
        policy: reads `observation`, writes `action`.
        action_spec: bounds of the random actions.
    """

    def __init__(self, policy: TensorDictModuleBase, action_spec: Bounded) -> None:
        super().__init__()
        self.in_keys, self.out_keys = policy.in_keys, policy.out_keys
        self._policy = [policy]  # in a list: its parameters are not this module's
        self._spec = action_spec
        self.active = False

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        if self.active:
            return tensordict.set("action", self._spec.rand())
        return cast(TensorDictBase, self._policy[0](tensordict))


class ReplayedFrames:
    """A sized iterable of collected batches with the minibatches that are owed for them.

    Args:
        collection: collects.
        buffer: where the frames go.
        ranks: processes that collect side by side.
        batches: length of one pass.
        batch_size, warmup_frames, updates_per_frame: as in `Replay`, `batch_size` of this rank.
        reward_scale: scales sampled rewards; None leaves them.
    """

    def __init__(
        self,
        collection: Collection,
        buffer: CompactReplayBuffer,
        *,
        ranks: int,
        batches: int,
        batch_size: int,
        warmup_frames: int,
        updates_per_frame: float,
        reward_scale: ReturnScale | None = None,
    ) -> None:
        self.collection, self.buffer, self.ranks, self.batches = collection, buffer, ranks, batches
        self.batch_size, self.warmup_frames, self.updates_per_frame = batch_size, warmup_frames, updates_per_frame
        self.reward_scale = reward_scale
        self.frames, self.updates = 0, 0  # collected by all ranks, and owed for them

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Replayed]:
        for _ in range(self.batches):
            yield self.next()

    def next(self) -> Replayed:
        """Collect, store, and count the updates that are owed."""
        policy = self.collection.collector.policy
        assert isinstance(policy, WarmUp)
        policy.active = self.frames < self.warmup_frames
        collected = self.collection.collect()
        self.buffer.extend(collected)
        self.frames += collected.numel() * self.ranks
        if self.reward_scale is not None:
            self.reward_scale.observe(collected["next", "reward"], collected["next", "done"])
        total = int(max(0, self.frames - self.warmup_frames) * self.updates_per_frame + 1e-6)
        owed, self.updates = total - self.updates, total
        prioritize = self.buffer.prioritize if self.buffer.prioritized is not None else None
        return Replayed(collected, owed, partial(self._minibatches, owed), prioritize)

    def _minibatches(self, count: int, seen: Seen) -> Iterator[Minibatch]:
        def scaled(drawn: Minibatch) -> Minibatch:
            if self.reward_scale is None:
                return seen(drawn)
            return seen({**drawn, "reward": self.reward_scale.scaled(drawn["reward"])})

        yield from self.buffer.minibatches(count, self.batch_size, scaled)

    def state_dict(self) -> dict[str, Any]:
        state = {"collection": self.collection.state_dict(), "frames": self.frames, "updates": self.updates}
        if self.reward_scale is not None:
            state["reward_scale"] = self.reward_scale.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.collection.load_state_dict(state["collection"])
        self.frames, self.updates = state["frames"], state["updates"]
        if self.reward_scale is not None:
            self.reward_scale.load_state_dict(state["reward_scale"])
