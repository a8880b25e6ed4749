"""Collecting and evaluating: a loop over an environment and a policy, exact from one batch to the next.

TorchRL's own collector takes a fifth to a quarter of a collected step of a wide environment; this loop keeps the plain
entries of each step and stacks them once. What comes out is laid out as TorchRL's collectors do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type

from lightning_hyper.checkpoint_file import EntryError
from lightning_hyper.envs import BatchedEnv

Entries = Mapping[str, Tensor]
Value = Callable[[Entries, Tensor | None], Tensor]


class Policy(Protocol):
    """What acts: chooses for one step `[num_envs, ...]`, and carries a state from step to step, or None."""

    def act(self, step: Any, state: Tensor | None) -> tuple[dict[str, Tensor], Tensor | None]:
        """Entries that it chooses, `action` among them, and the state after the step."""


class Collection:
    """Batches of `steps` frames from each environment, carried on exactly from one to the next.

    Args:
        env: batched environment.
        policy: acts.
        steps: frames of each environment in a batch.
        value: of a step that is not acted in, `(step, state) -> [K, 1]`; where given, a batch has `next_value`.
        keep_states: keep the policy's state before each step, and not only that before the batch.

    Attributes:
        state: of the policy, `[num_envs, state_features]`; None while it is fresh, or where there is none.
    """

    def __init__(
        self, env: BatchedEnv, policy: Policy, steps: int, *, value: Value | None = None, keep_states: bool = False
    ) -> None:
        self.env, self.policy, self.steps = env, policy, steps
        self.value, self.keep_states = value, keep_states
        self.state: Tensor | None = None

    @torch.no_grad()
    def collect(self) -> TensorDict:
        """One batch by the policy as it is now: entries `[num_envs, time, ...]`, and under `next` what followed.

        `context_state` `[num_envs, state_features]` is the policy's state before the batch (before each step with
        `keep_states`), where it has one. `next_value` `[num_envs, time, 1]` is the value of what follows each step:
        of the next step, or of the last observation where an episode is truncated or the batch ends.
        """
        env, act = self.env, self.policy.act
        step: Any = env.current if env.current is not None else env.begin()
        state = before = self.state
        steps, afters, cuts, states = [], [], _Cuts(), []
        with set_exploration_type(ExplorationType.RANDOM):
            for t in range(self.steps):
                states.append(state)
                chosen, state = act(step, state)
                after: Any = env.advance(chosen["action"])
                steps.append({**step, **chosen})
                afters.append(after)
                done = after["done"]
                ended = bool(done.any())
                if self.value is not None:
                    if t == self.steps - 1:
                        cuts.add(t, ~after["terminated"], after, state)
                    elif ended:
                        cuts.add(t, done & ~after["terminated"], after, state)
                step = env.begin(done.squeeze(-1)) if ended else env.current
        self.state = state
        batch = TensorDict(_stacked(steps), batch_size=[*env.batch_size, self.steps])
        batch["next"] = TensorDict(_stacked(afters), batch_size=batch.batch_size)
        if self.value is not None:
            batch["next_value"] = cuts.filled(batch["state_value"], self.value)
        if state is None:
            return batch
        fresh = torch.zeros_like(state)
        if self.keep_states:
            batch["context_state"] = torch.stack([fresh if each is None else each for each in states], 1)
        else:
            batch.batch_size = env.batch_size
            batch["context_state"] = fresh if before is None else before
        return batch

    def save_state(self) -> dict[str, Any]:
        """Everything that the next batch depends on, apart from policy and global generators; plain tensors."""
        if self.env.current is None:
            self.env.begin()
        return {"env": self.env.save_state(), "state": {} if self.state is None else {"policy": self.state.clone()}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `save_state`.

        Raises:
            EntryError: the policy's state is not one of these environments.
        """
        held = state["state"].get("policy")
        if held is not None and (held.ndim != 2 or len(held) != self.env.batch_size[0] or not held.isfinite().all()):
            raise EntryError(f"is a tensor of {tuple(held.shape)}, or not finite", "state", "policy")
        self.env.load_state(state["env"])
        self.state = None if held is None else held.to(self.env.device)


class _Cuts:
    """What a batch shows where it is cut: the last step of truncated episodes, and the step after its end."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.times: list[Tensor] = []
        self.entries: list[dict[str, Tensor]] = []
        self.states: list[Tensor] = []

    def add(self, time: int, where: Tensor, after: Entries, state: Tensor | None) -> None:
        rows = where.squeeze(-1).nonzero().squeeze(-1)
        if len(rows):
            self.rows.append(rows)
            self.times.append(torch.full_like(rows, time))
            self.entries.append({key: entry[rows] for key, entry in after.items()})
            self.states += [] if state is None else [state[rows]]

    def filled(self, values: Tensor, value: Value) -> Tensor:
        """Values after each step, of those `[num_envs, time, 1]` of the steps themselves."""
        after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
        if self.rows:
            entries = {key: torch.cat([each[key] for each in self.entries]) for key in self.entries[0]}
            state = torch.cat(self.states) if self.states else None
            after[torch.cat(self.rows), torch.cat(self.times)] = value(entries, state)
        return after


def _stacked(steps: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    # By time first, which copies whole steps; then turned around.
    return {key: torch.stack([step[key] for step in steps]).transpose(0, 1) for key in steps[-1]}


@torch.no_grad()
def first_episodes(env: BatchedEnv, policy: Policy, *, deterministic: bool) -> dict[str, Tensor]:
    """The first whole episode, or trial, of each environment, begun afresh, as the step that ends it.

    Args:
        env: batched environment; what has ended in it is stepped on without a reset, which would be for nothing.
        policy: acts.
        deterministic: take the most likely actions rather than draw them.

    Returns:
        `done`, `episode_return`, `step_count` `[num_envs, 1]`, `task` where it is shown, and in trials `by_episode`
        `[num_envs, episodes]`, the return of each episode.
    """
    step: Any = env.begin()
    over = torch.zeros(*env.batch_size, 1, dtype=torch.bool, device=env.device)
    ends = {key: torch.zeros_like(step[key]) for key in ("episode_return", "step_count")}
    shown = {"task": step["task"].clone()} if "task" in step else {}
    sums = torch.zeros(*env.batch_size, env.episodes, device=env.device) if "episode" in step else None
    state = None
    mode = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
    with set_exploration_type(mode):
        while not bool(over.all()):
            chosen, state = policy.act(step, state)
            after: Any = env.advance(chosen["action"])
            if sums is not None:
                sums.scatter_add_(1, step["episode"].clamp(max=env.episodes - 1), after["reward"] * ~over)
            fresh = after["done"] & ~over
            for key, end in ends.items():
                end.copy_(torch.where(fresh, after[key], end))
            over |= fresh
            step = env.current
    return {**ends, **shown, "done": over, **({} if sums is None else {"by_episode": sums})}
