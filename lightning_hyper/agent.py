"""A trained agent outside of the trainer: load a checkpoint, act in any loop."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import Any

import numpy as np
import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torchrl.envs.utils import ExplorationType, set_exploration_type

from lightning_hyper.algorithms import Algorithm
from lightning_hyper.checkpoint_file import CheckpointError, EntryError, read_checkpoint, require_weights
from lightning_hyper.checks import RecipeError
from lightning_hyper.envs import gym_spaces
from lightning_hyper.envs.spaces import Spaces
from lightning_hyper.folder import Root, file_name
from lightning_hyper.parts import instantiate_model
from lightning_hyper.tracking import connect, database, first_line, without_password


def load(
    source: str | Path,
    *,
    root: str | Path = "runs",
    tracking_uri: str | None = None,
    trust: Sequence[str] = (),
) -> Agent:
    """The agent of a checkpoint, with its normalisers, ready to act.

    Of the file only the spaces, the recipe's `model` and the weights are used, as data: nothing in it is executed, and
    nothing is imported or read for it but this package's own parts and what is trusted.

    Args:
        source: path of a checkpoint, or `runs:/<MLflow run id>` for a finished run's last one
            (`runs:/<id>/best` for its best).
        root: folder whose MLflow database is asked for a run.
        tracking_uri: MLflow server to ask instead.
        trust: modules, packages or classes outside of this package that the checkpoint may name.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or foreign, or names parts that are neither this package's
            nor trusted.
    """
    if str(source).startswith("runs:/"):
        with tempfile.TemporaryDirectory() as folder:
            path = _download(str(source), root, tracking_uri, folder)
            checkpoint = read_checkpoint(path, key=str(source))
    else:
        checkpoint = read_checkpoint(source, key="load")
    spaces = Spaces(**checkpoint["spaces"])
    return Agent(_model(checkpoint, spaces, source, trust).policy.eval(), spaces, checkpoint["recipe"])


def _model(checkpoint: dict[str, Any], spaces: Spaces, source: str | Path, trust: Sequence[str]) -> Algorithm:
    weights = checkpoint["state_dict"]
    try:
        with torch.random.fork_rng(devices=[]), _no_larger_than(weights):  # weights are drawn, and then replaced
            model = instantiate_model(checkpoint["recipe"].get("model", {}), trust=trust)
            model.build(spaces)
        require_weights(weights, model.state_dict())
        model.load_state_dict(weights)
    except EntryError as error:
        raise CheckpointError(f"load: {source} is damaged: its entry {error}") from error
    except RecipeError as error:
        raise CheckpointError(f"load: {source}: {error}") from error
    except Exception as error:  # sizes and options that no run had may make anything of the constructors
        said = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"load: {source}: the model of its recipe cannot be made ({type(error).__name__}: {said})"
        ) from error
    return model


@contextmanager
def _no_larger_than(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, a model that has more or larger parameters than these weights fails before it fills them."""
    here, largest = get_ident(), max((tensor.numel() for tensor in weights.values()), default=0)
    left = 4 * len(weights) + 100  # some are made, and then made anew

    def check(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        nonlocal left
        if get_ident() != here or parameter is None or torch.nn.parameter.is_lazy(parameter):
            return
        left -= 1
        if left < 0 or parameter.numel() > largest:
            raise EntryError(f"describes a larger model than the {len(weights)} tensors of state_dict", "recipe.model")

    handle = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _download(source: str, root: str | Path, tracking_uri: str | None, folder: str) -> Path:
    run_id, _, name = source.removeprefix("runs:/").partition("/")
    file_name("checkpoint", name or "last")
    place = without_password(tracking_uri or database(root))
    if tracking_uri is None and not Root(Path(root)).database.is_file():
        raise CheckpointError(f"{source}: no such checkpoint in {place}: there is no database")
    client = connect(root, tracking_uri)
    from mlflow.exceptions import MlflowException

    try:
        return Path(client.download_artifacts(run_id, f"checkpoints/{name or 'last'}.ckpt", folder))
    except (MlflowException, OSError) as error:
        raise CheckpointError(f"{source}: no such checkpoint in {place} ({first_line(error)})") from error


class Agent:
    """A policy that keeps its memory between calls; takes and gives what its environment does, in NumPy.

    Its draws come from a generator of its own: the caller's are left alone.

    Args:
        policy: trained policy.
        spaces: sizes that it was trained for.
        recipe: resolved recipe that it was trained by.
        seed: of the actions that are drawn.
    """

    def __init__(
        self, policy: TensorDictModuleBase, spaces: Spaces, recipe: dict[str, Any] | None = None, *, seed: int = 0
    ) -> None:
        self.policy, self.spaces, self.recipe = policy, spaces, recipe or {}
        self._raw = None if spaces.raw is None else gym_spaces.rebuild(spaces.raw["observation"])
        self._raw_action = None if spaces.raw is None else gym_spaces.rebuild(spaces.raw["action"])
        self._generator = torch.Generator().manual_seed(seed).get_state()
        self.reset()

    def reset(self, task: Any = None) -> None:
        """Begin a trial or an episode: forget everything.

        Args:
            task: for agents that are told their task: `[features]` or `[num_envs, features]` where it is a vector;
                where it is one of several, its name or index, or one for each environment. Agents of MiniGrid read it
                out of the mission's text unless several tasks share that.
        """
        self._state: Tensor | None = None
        self._action: Tensor | None = None
        self._task = task

    @torch.no_grad()
    def act(self, observation: Any, reward: Any = 0.0, done: Any = False, *, deterministic: bool = True) -> Any:
        """The next action, for one environment or for a batch of them.

        Args:
            observation: as the environment gives it, or `[num_envs, ...]` of such: for Gymnasium environments with
                dictionaries or tuples those; for MiniGrid its dictionary of `image` and `mission`.
            reward: of the last step, scalar or `[num_envs]`; ignored at the first step.
            done: whether the last step ended an episode of a trial, scalar or `[num_envs]`; the trial goes on until
                `reset`.
            deterministic: the most likely action rather than a drawn one.

        Raises:
            ValueError: the observation has other features, or another mission, than the agent was trained with; an
                agent that is told its task has none.
        """
        shown, single = self._shown(observation)
        n, first = len(shown["observation"]), self._action is None
        if self._action is None:
            kind = torch.int64 if self.spaces.discrete else torch.float32
            self._action = torch.zeros(n, *(() if self.spaces.discrete else (self.spaces.actions,)), dtype=kind)
        step = {
            **shown,
            "episode_done": _column(0.0 if first else done, n),
            "previous_action": self._action,
            "previous_reward": _column(0.0 if first else reward, n),
            "is_init": torch.full((n, 1), first),
        }
        mode = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
        with torch.random.fork_rng(devices=[]), set_exploration_type(mode):
            torch.set_rng_state(self._generator)
            chosen, self._state = self.policy.act(step, self._state)
            self._generator = torch.get_rng_state()
        self._action = chosen["action"]
        assert self._action is not None
        actions = self._action.numpy()
        if self._raw_action is not None:
            actions = np.stack([gym_spaces.to_action(self._raw_action, action) for action in actions])
        return actions[0] if single else actions

    def _shown(self, observation: Any) -> tuple[dict[str, Tensor], bool]:
        """What the observations and the task say, by entry `[num_envs, ...]`, and whether it is a single one."""
        told, shape = {}, self.spaces.observation
        if self.spaces.missions:
            told = self._mission(observation)
            observation = observation["image"]
        elif self._raw is not None:
            observation = self._flattened(observation)
        x = torch.as_tensor(np.asarray(observation))
        if tuple(x.shape[-len(shape) :]) != shape or not 0 <= x.ndim - len(shape) <= 1:
            sizes = ", ".join(map(str, shape))
            raise ValueError(f"observation is {tuple(x.shape)}; this agent takes [num_envs, {sizes}]")
        single = x.ndim == len(shape)
        x = x.reshape(-1, *shape)
        if not self.spaces.missions:
            told = self._told(len(x))
        return {"observation": x if self.spaces.is_image else x.float(), **told}, single

    def _flattened(self, observation: Any) -> Any:
        """Observations of a Gymnasium environment as they are shown in training."""
        assert self._raw is not None
        try:
            batched = not gym_spaces.is_single(self._raw, observation)
            return gym_spaces.to_observation(self._raw, observation, batched=batched)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"observation is not one of {self._raw}, nor a batch of them ({error})") from error

    def _told(self, n: int) -> dict[str, Tensor]:
        if self._task is None:
            if getattr(self.policy, "told", False):
                raise ValueError("this agent is told its task: give it with agent.reset(task=...)")
            return {}
        if self.spaces.tasks:
            names = np.broadcast_to(np.asarray(self._task, dtype=object), (n,))
            known = {name: k for k, name in enumerate(self.spaces.tasks)}
            indices = [known.get(name, name) for name in names]
            if any(index not in known.values() for index in indices):
                raise ValueError(f"task is {self._task!r}; it must be one of {', '.join(known)}, or its index")
            return {"task": torch.tensor([int(index) for index in indices])}
        task = torch.as_tensor(np.asarray(self._task), dtype=torch.float32)
        return {"task": task.expand(n, -1)}

    def _mission(self, observation: Any) -> dict[str, Tensor]:
        if not isinstance(observation, dict) or not {"image", "mission"} <= observation.keys():
            raise ValueError("observation: this agent takes MiniGrid's dictionary with `image` and `mission`")
        texts = np.atleast_1d(np.asarray(observation["mission"], dtype=object))
        names = np.broadcast_to(np.asarray(self._task, dtype=object), texts.shape)
        pairs = [(k, known) for k, missions in enumerate(self.spaces.missions) for known in missions]
        missions = []
        for name, text in zip(names, texts, strict=True):
            fitting = [
                m for m, (k, known) in enumerate(pairs) if known == text and name in (None, k, self.spaces.tasks[k])
            ]
            if len(fitting) != 1:
                sharing = dict.fromkeys(self.spaces.tasks[pairs[m][0]] for m in fitting)
                tasks = ", ".join(sharing or dict.fromkeys(self.spaces.tasks))
                fault = f"is that of {tasks}: say which with" if fitting else f"is not one of {tasks}; check"
                raise ValueError(f"the mission {text!r} {fault} agent.reset(task=...)")
            missions += fitting
        return {"mission": torch.tensor(missions), "task": torch.tensor([pairs[m][0] for m in missions])}


def _column(value: Any, n: int) -> Tensor:
    return torch.as_tensor(np.asarray(value), dtype=torch.float32).reshape(-1, 1).expand(n, 1)
