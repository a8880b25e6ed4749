"""MuJoCo families: gymnasium's v5 locomotion and balancing tasks."""

from __future__ import annotations

from typing import Any

import mujoco  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from lightning_hyper.checks import Copies, Count, checked
from lightning_hyper.envs.mujoco import ASSETS, Floats, MuJoCo


class HalfCheetah(MuJoCo):
    """Run forward on two legs in a plane: x velocity (m/s) minus 0.1 times the squared action; never terminates.

    Observations `[num_envs, 17]`, actions `[num_envs, 6]`, frames of 0.05 s. See `MuJoCo` for arguments and source.
    """

    xml, frame_skip = "half_cheetah.xml", 5
    MASS = 14.0

    def build(self) -> Any:
        # MuJoCo warns of the attribute that sets the mass, and asks for these two calls instead.
        text = (ASSETS / self.xml).read_text().replace('settotalmass="14"', "")
        model = mujoco.MjModel.from_xml_string(text)
        mujoco.mj_setTotalmass(model, self.MASS)
        mujoco.mj_setConst(model, mujoco.MjData(model))
        return model

    def observe(self) -> Floats:
        return np.concatenate((self.now["qpos"][:, 1:], self.now["qvel"]), axis=1)

    def reward(self, action: Floats, terminated: NDArray[np.bool_]) -> Floats:
        reward: Floats = self.rate("qpos", 0) - 0.1 * np.square(action).sum(1)
        return reward


class Hopper(MuJoCo):
    """Hop forward on one leg: x velocity (m/s) plus 1 while upright minus 0.001 times the squared action.

    Terminates when the torso is low or tilted or the state runs away. Observations `[num_envs, 11]`, actions
    `[num_envs, 3]`, frames of 0.008 s. See `MuJoCo` for arguments and source.
    """

    xml, frame_skip = "hopper.xml", 4
    noise, normal_velocities = 5e-3, False
    HEIGHT, TILT, LIMIT = (0.7, np.inf), 0.2, 100.0

    def observe(self) -> Floats:
        return np.concatenate((self.now["qpos"][:, 1:], self.now["qvel"].clip(-10, 10)), axis=1)

    def reward(self, action: Floats, terminated: NDArray[np.bool_]) -> Floats:
        reward: Floats = self.rate("qpos", 0) + ~terminated - 1e-3 * np.square(action).sum(1)
        return reward

    def terminated(self) -> NDArray[np.bool_]:
        # Written as what is healthy, so that a state that is not a number is not.
        qpos, qvel = self.now["qpos"], self.now["qvel"]
        low, high = self.HEIGHT
        upright = (low < qpos[:, 1]) & (qpos[:, 1] < high) & (np.abs(qpos[:, 2]) < self.TILT)
        tame = (np.abs(qpos[:, 2:]) < self.LIMIT).all(1) & (np.abs(qvel) < self.LIMIT).all(1)
        return ~(upright & tame)


class Walker2d(Hopper):
    """Walk forward on two legs in a plane: x velocity (m/s) plus 1 while upright minus 0.001 times the squared action.

    Terminates when the torso is low, high or tilted. Observations `[num_envs, 17]`, actions `[num_envs, 6]`, frames of
    0.008 s. See `MuJoCo` for arguments and source.
    """

    xml = "walker2d_v5.xml"
    HEIGHT, TILT, LIMIT = (0.8, 2.0), 1.0, np.inf


class Ant(MuJoCo):
    """Walk forward on four legs: the torso's x velocity (m/s) plus 1 while healthy minus control and contact costs.

    The costs are 0.5 times the squared action and 0.0005 times the squared contact forces, each clipped to [-1, 1].
    Terminates when the torso is low or high or the state is not finite. Observations `[num_envs, 105]`, of which the
    last 78 are the contact forces, actions `[num_envs, 8]`, frames of 0.05 s. See `MuJoCo` for arguments and source.
    """

    xml, frame_skip = "ant.xml", 5
    readings = ("qpos", "qvel", "xpos", "cfrc_ext")

    def observe(self) -> Floats:
        # The first six forces are those on the world.
        forces = self.now["cfrc_ext"][:, 6:].clip(-1, 1)
        return np.concatenate((self.now["qpos"][:, 2:], self.now["qvel"], forces), axis=1)

    def costs(self, action: Floats) -> Floats:
        """Control and contact costs of the last step, `[num_envs]`."""
        forces = self.now["cfrc_ext"].clip(-1, 1)
        paid: Floats = 0.5 * np.square(action).sum(1) + 5e-4 * np.square(forces).sum(1)
        return paid

    def reward(self, action: Floats, terminated: NDArray[np.bool_]) -> Floats:
        return self.rate("xpos", 3) + ~terminated - self.costs(action)

    def terminated(self) -> NDArray[np.bool_]:
        height = self.now["qpos"][:, 2]
        finite = np.isfinite(self.now["qpos"]).all(1) & np.isfinite(self.now["qvel"]).all(1)
        return ~(finite & (height >= 0.2) & (height <= 1.0))


class InvertedPendulum(MuJoCo):
    """Balance a pole on a cart: 1 for each frame within 0.2 rad of upright, termination beyond.

    Observations `[num_envs, 4]`, actions `[num_envs, 1]` in [-3, 3], frames of 0.04 s. See `MuJoCo` for arguments and
    source.
    """

    xml, frame_skip = "inverted_pendulum.xml", 2
    noise, normal_velocities = 0.01, False

    def observe(self) -> Floats:
        return np.concatenate((self.now["qpos"], self.now["qvel"]), axis=1)

    def reward(self, action: Floats, terminated: NDArray[np.bool_]) -> Floats:
        return (~terminated).astype(np.float64)

    def terminated(self) -> NDArray[np.bool_]:
        observation = self.observe()
        return ~(np.isfinite(observation).all(1) & (np.abs(observation[:, 1]) <= 0.2))


class InvertedDoublePendulum(MuJoCo):
    """Balance two poles on a cart: 10 for each frame minus the tip's distance from its highest point and velocities.

    Terminates when the tip falls to 1 m. Observations `[num_envs, 9]`, actions `[num_envs, 1]`, frames of 0.05 s. See
    `MuJoCo` for arguments and source.
    """

    xml, frame_skip = "inverted_double_pendulum.xml", 5
    readings = ("qpos", "qvel", "site_xpos", "qfrc_constraint")

    def observe(self) -> Floats:
        cart, angles = self.now["qpos"][:, :1], self.now["qpos"][:, 1:]
        velocity, force = self.now["qvel"].clip(-10, 10), self.now["qfrc_constraint"][:, :1].clip(-10, 10)
        return np.concatenate((cart, np.sin(angles), np.cos(angles), velocity, force), axis=1)

    def reward(self, action: Floats, terminated: NDArray[np.bool_]) -> Floats:
        x, y = self.now["site_xpos"][:, 0], self.now["site_xpos"][:, 2]
        first, second = self.now["qvel"][:, 1], self.now["qvel"][:, 2]
        lost = 0.01 * x**2 + (y - 2) ** 2 + 1e-3 * first**2 + 5e-3 * second**2
        return 10.0 * ~terminated - lost

    def terminated(self) -> NDArray[np.bool_]:
        return self.now["site_xpos"][:, 2] <= 1


class Reacher(MuJoCo):
    """Reach a random target with a two-link arm: minus the distance (m) and the squared action; never terminates.

    Observations `[num_envs, 10]`, actions `[num_envs, 2]`, frames of 0.02 s, 50 of them (`episode_steps`) to an
    episode by default. See `MuJoCo` for arguments and source.
    """

    xml, frame_skip = "reacher.xml", 2
    readings = ("qpos", "qvel", "xpos")

    @checked
    def __init__(
        self, num_envs: Copies = 1, *, episode_steps: Count = 50, threads: Copies = 1, device: str = "cpu"
    ) -> None:
        super().__init__(num_envs, episode_steps=episode_steps, threads=threads, device=device)

    def offset(self) -> Floats:
        """From the target to the fingertip, `[num_envs, 3]`, metres."""
        # Bodies: world, two links, fingertip, target.
        tip, target = self.now["xpos"][:, 9:12], self.now["xpos"][:, 12:15]
        return tip - target

    def observe(self) -> Floats:
        angles = self.now["qpos"][:, :2]
        target, velocity = self.now["qpos"][:, 2:], self.now["qvel"][:, :2]
        return np.concatenate((np.cos(angles), np.sin(angles), target, velocity, self.offset()[:, :2]), axis=1)

    def reward(self, action: Floats, terminated: NDArray[np.bool_]) -> Floats:
        reward: Floats = -np.linalg.norm(self.offset(), axis=1) - np.square(action).sum(1)
        return reward

    def draw(self, count: int) -> tuple[Floats, Floats]:
        model = self.models[0]
        qpos = model.qpos0 + self._uniform(count, model.nq, 0.1)
        qvel = self._uniform(count, model.nv, 0.005)
        # Polar rather than by rejection: uniform over the disc all the same.
        turn, share = self._uniform(count, 1, np.pi), np.sqrt(0.5 + self._uniform(count, 1, 0.5))
        qpos[:, 2:] = 0.2 * share * np.concatenate((np.cos(turn), np.sin(turn)), axis=1)
        qvel[:, 2:] = 0
        return qpos, qvel
