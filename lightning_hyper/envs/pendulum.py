"""Pendulum: swing up and hold, in batched torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from lightning_hyper.checks import Count, checked
from lightning_hyper.envs.base import BatchedEnv
from lightning_hyper.envs.rendering import SIZE


class Pendulum(BatchedEnv):
    """Swing a pendulum up and hold it there by a torque in [-2, 2] N m: minus the squared angle, speed and torque.

    Observations `[num_envs, 3]`: cosine and sine of the angle from upright, angular velocity (rad/s); frames of
    0.05 s. It never terminates. The rules are those of gymnasium's Pendulum-v1; the state is float64 as there.

    Args:
        num_envs: episodes stepped side by side.
        episode_steps: frames after which an episode is truncated.
        device: where the tensors live.

    Raises:
        RecipeError: a count out of range.

    Source: Towers et al. 2024 (arXiv 2407.17032), gymnasium's classic control.
    """

    simulates = True
    GRAVITY, SECONDS, TORQUE, SPEED = 10.0, 0.05, 2.0, 8.0

    @checked
    def __init__(self, num_envs: Count = 1, *, episode_steps: Count = 200, device: str = "cpu") -> None:
        super().__init__(num_envs, device)
        self.horizon, self.seconds = episode_steps, self.SECONDS
        self._angle = torch.zeros(num_envs, 1, device=self.device, dtype=torch.float64)
        self._velocity = torch.zeros_like(self._angle)
        torque = torch.tensor([self.TORQUE])
        self._make_specs((3,), (-torque, torque))

    def start(self, rows: Tensor) -> None:
        chosen = rows.unsqueeze(-1)
        drawn = torch.rand(len(rows), 2, generator=self.generator, device=self.device, dtype=torch.float64) * 2 - 1
        self._angle = torch.where(chosen, drawn[:, :1] * math.pi, self._angle)
        self._velocity = torch.where(chosen, drawn[:, 1:], self._velocity)

    def observation(self) -> Tensor:
        return torch.cat((self._angle.cos(), self._angle.sin(), self._velocity), -1).float()

    def simulate(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One frame under torques `[num_envs, 1]`, without resets, counters or time limit.

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

    def render(self) -> NDArray[Any]:
        """A rod at its angle from upright, counter-clockwise, with a weight at its end."""
        side = SIZE[1]
        picture = Image.new("RGB", (side, side), "white")
        draw, middle, length, angle = ImageDraw.Draw(picture), side / 2, side * 0.4, float(self._angle[0])
        tip = (middle - length * math.sin(angle), middle - length * math.cos(angle))
        draw.line([(middle, middle), tip], fill="#0072B2", width=10)
        for (x, y), radius, colour in (((middle, middle), 5, "#444444"), (tip, 12, "#D55E00")):
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
        return np.asarray(picture)

    def snapshot(self) -> dict[str, Any]:
        return {"qpos": self._angle.clone(), "qvel": self._velocity.clone()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.set_physics(state["qpos"], state["qvel"])
