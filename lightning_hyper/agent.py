"""A trained agent outside of the trainer: load a checkpoint, act in any loop."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jsonargparse import ArgumentParser
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type

from lightning_hyper import envs, experience, nn, objectives  # noqa: F401  their classes have short names in recipes
from lightning_hyper.algorithms import Algorithm
from lightning_hyper.checkpoint_file import CheckpointError, read_checkpoint
from lightning_hyper.modules import Spaces


def load(source: str | Path, *, root: str | Path = "runs", tracking_uri: str | None = None) -> Agent:
    """The agent of a checkpoint, with its normalisers, ready to act.

    Args:
        source: path of a checkpoint, or `runs:/<MLflow run id>` for a finished run's last one
            (`runs:/<id>/best` for its best).
        root: folder whose MLflow database is asked for a run.
        tracking_uri: MLflow server to ask instead.

    Raises:
        CheckpointError: the checkpoint is missing, truncated or foreign.
    """
    if str(source).startswith("runs:/"):
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = read_checkpoint(_download(str(source), Path(root), tracking_uri, folder))
    else:
        checkpoint = read_checkpoint(source)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Algorithm, "model")
    model = parser.instantiate_classes(parser.parse_object({"model": checkpoint["recipe"]["model"]})).model
    spaces = Spaces(**checkpoint["spaces"])
    model.build(spaces)
    model.load_state_dict(checkpoint["state_dict"])
    return Agent(model.policy.eval(), spaces, checkpoint["recipe"])


def _download(source: str, root: Path, tracking_uri: str | None, folder: str) -> Path:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    run_id, _, name = source.removeprefix("runs:/").partition("/")
    uri = tracking_uri or f"sqlite:///{(root / 'mlflow.db').resolve()}"
    try:
        client = MlflowClient(uri)
        return Path(client.download_artifacts(run_id, f"checkpoints/{name or 'last'}.ckpt", folder))
    except (MlflowException, OSError) as error:
        raise CheckpointError(f"{source}: no such checkpoint in {uri} ({error})") from error


class Agent:
    """A policy that keeps its memory between calls; takes and gives NumPy.

    Args:
        policy: trained policy.
        spaces: sizes that it was trained for.
        recipe: resolved recipe that it was trained by.
    """

    def __init__(self, policy: TensorDictModuleBase, spaces: Spaces, recipe: dict[str, Any]) -> None:
        self.policy, self.spaces, self.recipe = policy, spaces, recipe
        self.reset()

    def reset(self, task: Any = None) -> None:
        """Begin a trial or an episode: forget everything.

        Args:
            task: `[task]` or `[num_envs, task]`, for oracle policies only; for agents of many tasks the task's id, or
                one for each environment, needed where several tasks share the mission's text.
        """
        self._hidden: Tensor | None = None
        self._action: Tensor | None = None
        self._name = task if self.spaces.missions else None
        self._task = None
        if task is not None and not self.spaces.missions:
            self._task = torch.as_tensor(np.asarray(task), dtype=torch.float32)

    @torch.no_grad()
    def act(self, observation: Any, reward: Any = 0.0, done: Any = False, *, deterministic: bool = True) -> Any:
        """The next action, for one environment or for a batch of them.

        Args:
            observation: `[observation]` or `[num_envs, observation]`; for agents of many tasks MiniGrid's
                dictionary of `image` and `mission`.
            reward: of the last step, scalar or `[num_envs]`; ignored at the first step of a trial.
            done: whether the last step ended an episode, scalar or `[num_envs]`; the trial goes on until `reset`.
            deterministic: the most likely action rather than a drawn one.

        Raises:
            ValueError: the observation has other features, or another mission, than the agent was trained with; an
                oracle has no task.
        """
        shape = self.spaces.image or (self.spaces.observation,)
        mission = None
        if self.spaces.missions:
            mission, observation = self._mission(observation), observation["image"]
        x = torch.as_tensor(np.asarray(observation))
        if tuple(x.shape[-len(shape) :]) != shape or not 0 <= x.ndim - len(shape) <= 1:
            sizes = ", ".join(map(str, shape))
            raise ValueError(f"observation is {tuple(x.shape)}; this agent takes [num_envs, {sizes}]")
        if getattr(self.policy, "uses_task", False) and self._task is None:
            raise ValueError("this agent's context is the task itself: give it with agent.reset(task=...)")
        single = x.ndim == len(shape)
        x = x.float().reshape(-1, *shape)
        n, first = len(x), self._action is None
        action = torch.zeros(n, *(() if self.spaces.discrete else (self.spaces.actions,)))
        step = TensorDict(
            {
                "observation": x,
                "episode_done": _column(0.0 if first else done, n),
                "previous_action": (action.long() if self.spaces.discrete else action) if first else self._action,
                "previous_reward": _column(0.0 if first else reward, n),
                "is_init": torch.full((n, 1), first),
                "task": torch.zeros(n, self.spaces.task) if self._task is None else self._task.expand(n, -1),
            },
            batch_size=[n],
        )
        if mission is not None:
            step["mission"] = mission
        if self._hidden is not None:
            step["hidden"] = self._hidden
        mode = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
        with set_exploration_type(mode):
            step = cast(TensorDict, self.policy(step))
        self._hidden, self._action = step.get("hidden", None), step["action"]
        chosen = self._action.numpy()
        return chosen[0] if single else chosen

    def _mission(self, observation: Any) -> Tensor:
        if not isinstance(observation, dict) or not {"image", "mission"} <= observation.keys():
            raise ValueError("observation: this agent takes MiniGrid's dictionary with `image` and `mission`")
        texts = np.atleast_1d(np.asarray(observation["mission"], dtype=object))
        names = np.broadcast_to(np.asarray(self._name, dtype=object), texts.shape)
        of_tasks = zip(self.spaces.tasks, self.spaces.missions, strict=True)
        pairs = [(task, known) for task, missions in of_tasks for known in missions]
        indices = []
        for name, text in zip(names, texts, strict=True):
            fitting = [k for k, (task, known) in enumerate(pairs) if known == text and name in (None, task)]
            if len(fitting) != 1:
                tasks = ", ".join(dict.fromkeys(pairs[k][0] for k in fitting) or dict.fromkeys(self.spaces.tasks))
                fault = f"is that of {tasks}: say which with" if fitting else f"is not one of {tasks}; check"
                raise ValueError(f"the mission {text!r} {fault} agent.reset(task=...)")
            indices += fitting
        return torch.tensor(indices)


def _column(value: Any, n: int) -> Tensor:
    return torch.as_tensor(np.asarray(value), dtype=torch.float32).reshape(-1, 1).expand(n, 1)
