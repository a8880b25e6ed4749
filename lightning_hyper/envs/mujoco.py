"""MuJoCo: many simulators stepped inside one environment."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, cast

import gymnasium
import mujoco  # type: ignore[import-untyped]
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_hyper.checks import Copies, Count, checked
from lightning_hyper.envs.base import BatchedEnv
from lightning_hyper.envs.rendering import film_mujoco

Floats = NDArray[np.float64]
ASSETS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
# Everything that the next step depends on; the solver's warm start is part of it.
STATE = mujoco.mjtState.mjSTATE_INTEGRATION


class MuJoCo(BatchedEnv):
    """A batch of raw MuJoCo simulators; a family says what they show, what they pay and where they end.

    A family overrides `observe`, `reward` and, if it needs to, `terminated` and `draw`, over `now` and `before`:
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
        RecipeError: a count out of range.

    Source: Todorov et al. 2012 (MuJoCo); Towers et al. 2024 (arXiv 2407.17032), gymnasium's v5 environments.
    """

    simulates = True
    xml: ClassVar[str]
    frame_skip: ClassVar[int]
    readings: ClassVar[tuple[str, ...]] = ("qpos", "qvel")
    # Of a reset: positions are uniform within this bound, velocities too or normal with this standard deviation.
    noise: ClassVar[float] = 0.1
    normal_velocities: ClassVar[bool] = True

    @checked
    def __init__(
        self, num_envs: Copies = 1, *, episode_steps: Count = 1000, threads: Copies = 1, device: str = "cpu"
    ) -> None:
        super().__init__(num_envs, device)
        # Simulators do not depend on the device.
        self.generator = torch.Generator()
        self.horizon = episode_steps
        self.models = [self.build()] * num_envs
        self._bind()
        self._helpers = min(threads, num_envs) - 1
        self._pool = ThreadPoolExecutor(self._helpers) if self._helpers else None
        model = self.models[0]
        self.seconds = model.opt.timestep * self.frame_skip
        low, high = torch.from_numpy(model.actuator_ctrlrange.copy()).unbind(1)
        self._make_specs((self.observe().shape[1],), (low, high))

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
    def observe(self) -> Floats:
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
        return (self.now[name][:, columns] - self.before[name][:, columns]) / cast(float, self.seconds)

    def _uniform(self, count: int, size: int, bound: float) -> Floats:
        unit = torch.rand(count, size, generator=self.generator, dtype=torch.float64)
        return unit.numpy() * (2 * bound) - bound

    def _normal(self, count: int, size: int, std: float) -> Floats:
        return torch.randn(count, size, generator=self.generator, dtype=torch.float64).numpy() * std

    def observation(self) -> Tensor:
        return torch.from_numpy(self.observe().astype(np.float32)).to(self.device)

    def simulate(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One frame of every simulator, without resets, counters or time limit.

        Args:
            action: `[num_envs, actions]`; the simulator clips it to the actuators' ranges, the reward sees it as it is.

        Returns:
            observation `[num_envs, features]`, reward `[num_envs]` and terminated `[num_envs]`.

        Raises:
            ValueError: an action of another shape.
        """
        # In NumPy, as a step of one simulator is short enough to be slowed by conversions.
        torque = action.detach().cpu().numpy().astype(np.float64)
        if torque.shape != (expected := (len(self.models), self.models[0].nu)):
            raise ValueError(f"{type(self).__name__}: the action has shape {torque.shape}; it must be {expected}")
        for control, row in zip(self._controls, torque, strict=True):
            control[:] = row
        # One iterator for all threads: whoever is free takes the next simulator, so that none waits for a slow one.
        # Under the interpreter's lock none is taken twice.
        waiting = iter(self._simulators)
        helpers = [self._pool.submit(self._run, waiting) for _ in range(self._helpers)] if self._pool else []
        self._run(waiting)
        for helper in helpers:
            helper.result()
        # In place, as setting an attribute of an environment takes TorchRL microseconds.
        self.before.update(self.now)
        self.now.update(self._read())
        terminated = self.terminated()
        reward = self.reward(torque, terminated)
        arrays = (self.observe().astype(np.float32), reward.astype(np.float32), terminated)
        observation, pay, ends = (torch.from_numpy(array).to(self.device) for array in arrays)
        return observation, pay, ends

    def _run(self, waiting: Iterator[tuple[Any, Any]]) -> None:
        # `mj_step` lets go of the interpreter's lock, so threads overlap.
        step, frames = mujoco.mj_step, self.frame_skip
        # Contact forces are not part of a step.
        contacts = mujoco.mj_rnePostConstraint if "cfrc_ext" in self.readings else None
        for model, data in waiting:
            step(model, data, frames)
            if contacts is not None:
                contacts(model, data)

    def start(self, rows: Tensor) -> None:
        chosen = rows.nonzero().squeeze(1).tolist()
        for i in chosen:
            mujoco.mj_resetData(*self._simulators[i])
        self._place(chosen, *self.draw(len(chosen)))

    def sight(self) -> Floats:
        """Generalised positions of the first simulator, `[nq]`."""
        return cast(Floats, self.now["qpos"][0].copy())

    def film(self, sights: Sequence[Floats], path: Path, seconds: float) -> None:
        film_mujoco(self.models[0], sights, path, seconds)

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

    def snapshot(self) -> dict[str, Any]:
        state = np.empty((len(self.models), mujoco.mj_stateSize(self.models[0], STATE)))
        for (model, data), row in zip(self._simulators, state, strict=True):
            mujoco.mj_getState(model, data, row, STATE)
        # Readings such as body positions lag behind the state, so they are kept as they were read.
        return {name: torch.from_numpy(array.copy()) for name, array in {"simulators": state, **self.now}.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        for (model, data), row in zip(self._simulators, state["simulators"].cpu().numpy(), strict=True):
            mujoco.mj_setState(model, data, row, STATE)
        self.now = {name: state[name].cpu().numpy().copy() for name in self.readings}
        self.before = dict(self.now)
