"""The entries that every environment shows: the one place that lists them."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor


class Step(TypedDict, total=False):
    """What `num_envs` environments show at one moment, and after a frame what that frame gave; `n` is `num_envs`.

    An environment may add entries of its own, `[n, ...]`. Entries that were given away are never changed.

    Attributes:
        observation: `[n, *shape]`, float32 for a vector; an image has any dtype.
        is_init: `[n, 1]`, bool: whether nothing was done yet in this episode.
        previous_action: the action that led here, int64 `[n]` or float32 `[n, actions]`; zeros where `is_init`.
        previous_reward: `[n, 1]`, float32: the reward that came with it; zero where `is_init`.
        step_count: `[n, 1]`, int64: frames since the reset.
        episode_return: `[n, 1]`, float32: undiscounted reward since the reset.
        task: what the task is, float32 `[n, features]`, or its index, int64 `[n]`; only where there are tasks.
        mission: `[n]`, int64: index into the texts that episodes are about; only where there are texts.
        episode_done: `[n, 1]`, float32: 1 where the last frame ended an episode of the trial; only in trials.
        episode: `[n, 1]`, int64: episodes of the trial that are over; only in trials.
        reward: `[n, 1]`, float32; after a frame.
        done: `[n, 1]`, bool: `terminated` or `truncated`; after a frame.
        terminated: `[n, 1]`, bool: whether the task itself ended here, so that nothing more can be earned.
        truncated: `[n, 1]`, bool: whether the episode was cut off, and not terminated.
    """

    observation: Tensor
    is_init: Tensor
    previous_action: Tensor
    previous_reward: Tensor
    step_count: Tensor
    episode_return: Tensor
    task: Tensor
    mission: Tensor
    episode_done: Tensor
    episode: Tensor
    reward: Tensor
    done: Tensor
    terminated: Tensor
    truncated: Tensor
