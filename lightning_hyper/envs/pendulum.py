"""Pendulum: swing up and hold, in batched torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from lightning_hyper.envs.base import EpisodeEnv


class Pendulum(EpisodeEnv):
    """Swing a pendulum up and hold it there by a torque in [-2, 2] N m: minus the squared angle, speed and torque.

    Observations `[num_envs, 3]`: cosine and sine of the angle from upright, angular velocity (rad/s); frames of
    0.05 s. It never terminates. The rules are those of gymnasium's Pendulum-v1; the state is float64 as there.

    Args:
        num_envs: episodes stepped side by side.
        episode_steps: frames after which an episode is truncated.
        device: where the tensors live.

    Raises:
        ValueError: a count out of range.

    Source: Towers et al. 2024 (arXiv 2407.17032), gymnasium's classic control.
    """

    GRAVITY, SECONDS, TORQUE, SPEED = 10.0, 0.05, 2.0, 8.0

    def __init__(self, num_envs: int = 1, *, episode_steps: int = 200, device: str = "cpu") -> None:
        super().__init__(num_envs, episode_steps, device)
        self._angle = torch.zeros(num_envs, 1, device=self.device, dtype=torch.float64)
        self._velocity = torch.zeros_like(self._angle)
        self._steps = torch.zeros(num_envs, 1, device=self.device, dtype=torch.int64)
        self._returns = torch.zeros(num_envs, 1, device=self.device)
        torque = torch.tensor([self.TORQUE])
        self._make_specs(3, -torque, torque)

    def observation(self) -> Tensor:
        """What is shown now, `[num_envs, 3]`, float32."""
        return torch.cat((self._angle.cos(), self._angle.sin(), self._velocity), -1).float()

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One frame under torques `[num_envs, 1]`, without resets or a limit of frames.

        Returns:
            observation `[num_envs, 3]`, reward `[num_envs]` and terminated `[num_envs]`, which is always false.
        """
        torque = action.detach().double().clamp(-self.TORQUE, self.TORQUE)
        angle, velocity = self._angle, self._velocity
        from_upright = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
        reward = -(from_upright**2 + 0.1 * velocity**2 + 0.001 * torque**2)
        acceleration = 1.5 * self.GRAVITY * angle.sin() + 3 * torque
        self._velocity = (velocity + acceleration * self.SECONDS).clamp(-self.SPEED, self.SPEED)
        self._angle = angle + self._velocity * self.SECONDS
        terminated = torch.zeros(len(reward), dtype=torch.bool, device=self.device)
        return self.observation(), reward.float().squeeze(-1), terminated

    def qpos(self) -> Tensor:
        """Angles from upright now, `[num_envs, 1]`, rad, not wrapped."""
        return self._angle.clone()

    def set_physics(self, qpos: Tensor, qvel: Tensor) -> None:
        """Put every pendulum at an angle `[num_envs, 1]` and an angular velocity `[num_envs, 1]`; counters go on."""
        shape = self._angle.shape
        for name, given in (("qpos", qpos), ("qvel", qvel)):
            if given.shape != shape:
                raise ValueError(f"Pendulum: {name} has shape {tuple(given.shape)}; it must be {tuple(shape)}")
        self._angle, self._velocity = (x.to(self.device, torch.float64, copy=True) for x in (qpos, qvel))

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        chosen = None if tensordict is None else tensordict.get("_reset", None)
        if chosen is None:
            chosen = torch.ones_like(self._steps, dtype=torch.bool)
        chosen = chosen.reshape(-1, 1)
        drawn = torch.rand(len(chosen), 2, generator=self.generator, device=self.device, dtype=torch.float64) * 2 - 1
        self._angle = torch.where(chosen, drawn[:, :1] * math.pi, self._angle)
        self._velocity = torch.where(chosen, drawn[:, 1:], self._velocity)
        self._steps = self._steps.masked_fill(chosen, 0)
        self._returns = self._returns.masked_fill(chosen, 0)
        return self._give(self.observation(), {})

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        observation, reward, terminated = self.advance(tensordict.get("action"))
        reward, terminated = reward[:, None], terminated[:, None]
        self._steps = self._steps + 1
        self._returns = self._returns + reward
        done = self._steps >= self.horizon
        return self._give(
            observation, {"reward": reward, "done": done, "terminated": terminated, "truncated": done.clone()}
        )

    def _give(self, observation: Tensor, more: dict[str, Tensor]) -> TensorDictBase:
        entries = {
            "observation": observation,
            "is_init": self._steps == 0,
            "step_count": self._steps.clone(),
            "episode_return": self._returns.clone(),
            **more,
        }
        return TensorDict(entries, batch_size=self.batch_size, device=self.device)

    def save_state(self) -> dict[str, Tensor]:
        kept = {"qpos": self._angle, "qvel": self._velocity}
        counters = {"step_count": self._steps, "episode_return": self._returns}
        return super().save_state() | {name: tensor.clone() for name, tensor in (kept | counters).items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        self.set_physics(state["qpos"], state["qvel"])
        self._steps = state["step_count"].to(self.device, copy=True)
        self._returns = state["episode_return"].to(self.device, copy=True)
