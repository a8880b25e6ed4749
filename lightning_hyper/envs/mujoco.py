"""MuJoCo locomotion and balancing: gymnasium's v5 tasks, many simulators stepped inside one environment."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import mujoco  # type: ignore[import-untyped]
import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from lightning_hyper.envs.base import EpisodeEnv

Floats = NDArray[np.float64]
ASSETS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
# Everything that the next step depends on; the solver's warm start is part of it.
STATE = mujoco.mjtState.mjSTATE_INTEGRATION


class MuJoCo(EpisodeEnv):
    """A batch of raw MuJoCo simulators; a family says what they show, what they pay and where they end.

    A family overrides `observation`, `reward` and, if it needs to, `terminated` and `draw`, over `now` and `before`:
    the simulators' arrays after and before the last step. The rules are those of gymnasium's v5 environment of the
    same name.

    Args:
        num_envs: simulators stepped side by side.
        episode_steps: frames after which an episode is truncated; a frame is `frame_skip` steps of the simulator.
        threads: threads that share the simulators; results do not depend on it.
        device: where the tensors live; the simulators run on the CPU.

    Attributes:
        models: the compiled model of each simulator; all the same one unless a family says otherwise.
        now, before: each of `readings`, `[num_envs, size]`, float64.
        seconds: simulated time of a frame.

    Raises:
        ValueError: a count out of range.

    Source: Todorov et al. 2012 (MuJoCo); Towers et al. 2024 (arXiv 2407.17032), gymnasium's v5 environments.
    """

    xml: ClassVar[str]
    frame_skip: ClassVar[int]
    readings: ClassVar[tuple[str, ...]] = ("qpos", "qvel")
    # Of a reset: positions are uniform within this bound, velocities too or normal with this standard deviation.
    noise: ClassVar[float] = 0.1
    normal_velocities: ClassVar[bool] = True

    def __init__(self, num_envs: int = 1, *, episode_steps: int = 1000, threads: int = 1, device: str = "cpu") -> None:
        if threads < 1:
            raise ValueError(f"{type(self).__name__}: threads is {threads}; it must be at least 1")
        super().__init__(num_envs, episode_steps, device)
        self.generator = torch.Generator()
        self.models = [self.build()] * num_envs
        self._bind()
        self._helpers = min(threads, num_envs) - 1
        self._pool = ThreadPoolExecutor(self._helpers) if self._helpers else None
        self._steps = np.zeros((num_envs, 1), dtype=np.int64)
        self._returns = np.zeros((num_envs, 1), dtype=np.float32)
        model = self.models[0]
        self.seconds: float = model.opt.timestep * self.frame_skip
        low, high = torch.from_numpy(model.actuator_ctrlrange.copy()).unbind(1)
        self._make_specs(self.observation().shape[1], low, high)

    def build(self) -> Any:
        """The compiled `mujoco.MjModel`."""
        return mujoco.MjModel.from_xml_path(str(ASSETS / self.xml))

    def _bind(self) -> None:
        """Give each of `models` fresh data, and keep views of the arrays that are read and written at each step."""
        datas = [mujoco.MjData(model) for model in self.models]
        for model, data in zip(self.models, datas, strict=True):
            mujoco.mj_forward(model, data)
        self._simulators = list(zip(self.models, datas, strict=True))
        self._controls = [data.ctrl for data in datas]
        self._views = {name: [getattr(data, name).reshape(-1) for data in datas] for name in self.readings}
        self.now = self._read()
        self.before = dict(self.now)

    def _read(self) -> dict[str, Floats]:
        n = len(self.models)
        return {name: np.concatenate(views).reshape(n, -1) for name, views in self._views.items()}

    @abstractmethod
    def observation(self) -> Floats:
        """What the simulators show now, `[num_envs, features]`."""

    @abstractmethod
    def reward(self, action: Floats, terminated: NDArray[np.bool_]) -> Floats:
        """Reward of the last step, `[num_envs]`; actions are `[num_envs, actions]`, terminations `[num_envs]`."""

    def terminated(self) -> NDArray[np.bool_]:
        """Whether each simulator is in a terminal state now, `[num_envs]`; never, unless a family says so."""
        return np.zeros(len(self.models), dtype=np.bool_)

    def draw(self, count: int) -> tuple[Floats, Floats]:
        """Positions `[count, nq]` and velocities `[count, nv]` of new episodes, from `generator`."""
        model = self.models[0]
        velocities = self._normal if self.normal_velocities else self._uniform
        return model.qpos0 + self._uniform(count, model.nq, self.noise), velocities(count, model.nv, self.noise)

    def rate(self, name: str, columns: int | slice) -> Floats:
        """Mean change per second of a reading's columns over the last frame, `[num_envs, columns]`."""
        return (self.now[name][:, columns] - self.before[name][:, columns]) / self.seconds

    def _uniform(self, count: int, size: int, bound: float) -> Floats:
        unit = torch.rand(count, size, generator=self.generator, dtype=torch.float64)
        return unit.numpy() * (2 * bound) - bound

    def _normal(self, count: int, size: int, std: float) -> Floats:
        return torch.randn(count, size, generator=self.generator, dtype=torch.float64).numpy() * std

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One frame of every simulator, without resets or a limit of frames.

        Args:
            action: `[num_envs, actions]`; the simulator clips it to the actuators' ranges, the reward sees it as it is.

        Returns:
            observation `[num_envs, features]`, reward `[num_envs]` and terminated `[num_envs]`.

        Raises:
            ValueError: an action of another shape.
        """
        arrays = self._advance(action.detach().cpu().numpy())
        observation, reward, terminated = (torch.from_numpy(array).to(self.device) for array in arrays)
        return observation, reward, terminated

    def _advance(
        self, action: NDArray[np.floating[Any]]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
        # In NumPy, as a step of one simulator is short enough to be slowed by conversions.
        if action.shape != (expected := (len(self.models), self.models[0].nu)):
            raise ValueError(f"{type(self).__name__}: the action has shape {action.shape}; it must be {expected}")
        torque = action.astype(np.float64)
        for control, row in zip(self._controls, torque, strict=True):
            control[:] = row
        # One iterator for all threads: whoever is free takes the next simulator, so that none waits for a slow one.
        # Under the interpreter's lock none is taken twice.
        waiting = iter(self._simulators)
        helpers = [self._pool.submit(self._simulate, waiting) for _ in range(self._helpers)] if self._pool else []
        self._simulate(waiting)
        for helper in helpers:
            helper.result()
        # In place, as setting an attribute of an environment takes TorchRL microseconds.
        self.before.update(self.now)
        self.now.update(self._read())
        terminated = self.terminated()
        reward = self.reward(torque, terminated)
        return self.observation().astype(np.float32), reward.astype(np.float32), terminated

    def _simulate(self, waiting: Iterator[tuple[Any, Any]]) -> None:
        # `mj_step` lets go of the interpreter's lock, so threads overlap.
        step, frames = mujoco.mj_step, self.frame_skip
        # Contact forces are not part of a step.
        contacts = mujoco.mj_rnePostConstraint if "cfrc_ext" in self.readings else None
        for model, data in waiting:
            step(model, data, frames)
            if contacts is not None:
                contacts(model, data)

    def restart(self, rows: Sequence[int]) -> None:
        """Start a new episode in each simulator of `rows`."""
        for i in rows:
            mujoco.mj_resetData(*self._simulators[i])
        self._place(rows, *self.draw(len(rows)))
        self._steps[rows] = 0
        self._returns[rows] = 0

    def qpos(self) -> Floats:
        """Generalised positions now, `[num_envs, nq]`."""
        return self.now["qpos"].copy()

    def set_physics(self, qpos: Floats, qvel: Floats) -> None:
        """Put every simulator at positions `[num_envs, nq]` and velocities `[num_envs, nv]`; counters go on.

        Raises:
            ValueError: an array of another shape.
        """
        model, n = self.models[0], len(self.models)
        for name, given, size in (("qpos", qpos, model.nq), ("qvel", qvel, model.nv)):
            if given.shape != (n, size):
                raise ValueError(f"{type(self).__name__}: {name} has shape {given.shape}; it must be {(n, size)}")
        self._place(range(n), qpos, qvel)

    def _place(self, rows: Sequence[int], qpos: Floats, qvel: Floats) -> None:
        for i, position, velocity in zip(rows, qpos, qvel, strict=True):
            model, data = self._simulators[i]
            data.qpos[:], data.qvel[:] = position, velocity
            mujoco.mj_forward(model, data)
            for name, views in self._views.items():
                self.now[name][i] = views[i]

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        chosen = None if tensordict is None else tensordict.get("_reset", None)
        n = len(self.models)
        self.restart(range(n) if chosen is None else chosen.reshape(n).nonzero().squeeze(1).tolist())
        return self._give(self.observation().astype(np.float32), {})

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action: Tensor = tensordict.get("action")
        observation, reward, ended = self._advance(action.detach().cpu().numpy())
        reward, terminated = reward[:, None], ended[:, None]
        np.add(self._steps, 1, out=self._steps)
        np.add(self._returns, reward, out=self._returns)
        done = terminated | (self._steps >= self.horizon)
        return self._give(
            observation, {"reward": reward, "done": done, "terminated": terminated, "truncated": done & ~terminated}
        )

    def _give(self, observation: NDArray[np.float32], more: dict[str, NDArray[Any]]) -> TensorDictBase:
        entries = {
            "observation": observation,
            "is_init": self._steps == 0,
            "step_count": self._steps.copy(),
            "episode_return": self._returns.copy(),
            **more,
        }
        tensors = {name: torch.from_numpy(entry) for name, entry in entries.items()}
        return TensorDict(tensors, batch_size=self.batch_size, device=self.device)

    def save_state(self) -> dict[str, Tensor]:
        state = np.empty((len(self.models), mujoco.mj_stateSize(self.models[0], STATE)))
        for (model, data), row in zip(self._simulators, state, strict=True):
            mujoco.mj_getState(model, data, row, STATE)
        # Readings such as body positions lag behind the state, so they are kept as they were read.
        arrays = {"simulators": state, "step_count": self._steps, "episode_return": self._returns, **self.now}
        return super().save_state() | {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        arrays = {name: tensor.cpu().numpy() for name, tensor in state.items()}
        for (model, data), row in zip(self._simulators, arrays["simulators"], strict=True):
            mujoco.mj_setState(model, data, row, STATE)
        self._steps, self._returns = arrays["step_count"].copy(), arrays["episode_return"].copy()
        self.now = {name: arrays[name].copy() for name in self.readings}
        self.before = dict(self.now)


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

    def observation(self) -> Floats:
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

    def observation(self) -> Floats:
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

    def observation(self) -> Floats:
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

    def observation(self) -> Floats:
        return np.concatenate((self.now["qpos"], self.now["qvel"]), axis=1)

    def reward(self, action: Floats, terminated: NDArray[np.bool_]) -> Floats:
        return (~terminated).astype(np.float64)

    def terminated(self) -> NDArray[np.bool_]:
        observation = self.observation()
        return ~(np.isfinite(observation).all(1) & (np.abs(observation[:, 1]) <= 0.2))


class InvertedDoublePendulum(MuJoCo):
    """Balance two poles on a cart: 10 for each frame minus the tip's distance from its highest point and velocities.

    Terminates when the tip falls to 1 m. Observations `[num_envs, 9]`, actions `[num_envs, 1]`, frames of 0.05 s. See
    `MuJoCo` for arguments and source.
    """

    xml, frame_skip = "inverted_double_pendulum.xml", 5
    readings = ("qpos", "qvel", "site_xpos", "qfrc_constraint")

    def observation(self) -> Floats:
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

    Observations `[num_envs, 10]`, actions `[num_envs, 2]`, frames of 0.02 s. See `MuJoCo` for arguments and source.
    """

    xml, frame_skip = "reacher.xml", 2
    readings = ("qpos", "qvel", "xpos")

    def __init__(self, num_envs: int = 1, *, episode_steps: int = 50, threads: int = 1, device: str = "cpu") -> None:
        super().__init__(num_envs, episode_steps=episode_steps, threads=threads, device=device)

    def offset(self) -> Floats:
        """From the target to the fingertip, `[num_envs, 3]`, metres."""
        # Bodies: world, two links, fingertip, target.
        tip, target = self.now["xpos"][:, 9:12], self.now["xpos"][:, 12:15]
        return tip - target

    def observation(self) -> Floats:
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
