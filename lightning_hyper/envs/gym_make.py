"""Making Gymnasium's environments from what a recipe says, and saying in one sentence why one cannot be made."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import gymnasium
from gymnasium import Env, error

from lightning_hyper.checks import RecipeError

ATARI = "pip install 'lightning-hyper[atari]'"


@dataclass(frozen=True)
class Maker:
    """Makes copies of one environment.

    Args:
        id: gymnasium's name of it, `module:` before it where a module is to be imported first.
        arguments: keyword arguments of `gymnasium.make`.
        wrappers: class paths, or dictionaries of `class_path` and `init_args`, from the innermost outwards.
        render: whether pictures will be asked for.

    Raises:
        RecipeError: at a call; it cannot be made.
    """

    id: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    wrappers: Sequence[str | Mapping[str, Any]] = ()
    render: bool = False

    def __call__(self) -> Env[Any, Any]:
        arguments = {**self.arguments, **({"render_mode": "rgb_array"} if self.render else {})}
        try:
            env = gymnasium.make(_registered(self.id), disable_env_checker=True, **arguments)
        except (error.Error, ImportError, TypeError) as failure:
            given = f" with data.env.arguments {arguments}" if arguments else ""
            raise RecipeError(f"data.env: Gym({self.id!r}) cannot be made{given} ({_line(failure)})") from failure
        if self.render and "rgb_array" not in env.metadata.get("render_modes", ()):
            raise RecipeError(
                f"data.env.render is true, but Gym({self.id!r}) makes no pictures (rgb_array); its render modes are "
                f"{env.metadata.get('render_modes', [])}"
            )
        for wrapper in self.wrappers:
            env = _wrapped(env, wrapper)
        return env


def _registered(name: str) -> str:
    """The id, once it is known to be registered."""
    module, _, plain = name.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as failure:
            raise RecipeError(
                f"data.env.id is {name!r}, and the module {module} cannot be imported ({failure})"
            ) from None
    try:
        gymnasium.spec(plain)
        return plain
    except error.Error as failure:
        problem = failure
    try:
        # Its import registers the Atari games.
        ale_py = importlib.import_module("ale_py")
        gymnasium.register_envs(ale_py)
        gymnasium.spec(plain)
        return plain
    except ImportError:
        if plain.startswith("ALE/"):
            raise RecipeError(f"data.env.id is {name!r}, which needs the Atari games: {ATARI}") from None
    except error.Error as failure:
        problem = failure
    close = difflib.get_close_matches(plain, list(gymnasium.registry), 3, 0.5)
    hint = (
        f"close to it: {', '.join(close)}"
        if close
        else "put `module:` before it to import the module that registers it"
    )
    raise RecipeError(f"data.env.id is {name!r}, which gymnasium does not know ({_line(problem)}); {hint}")


def _wrapped(env: Env[Any, Any], wrapper: str | Mapping[str, Any]) -> Env[Any, Any]:
    given: dict[str, Any] = {"class_path": wrapper} if isinstance(wrapper, str) else dict(wrapper)
    path, arguments = given.pop("class_path", ""), given.pop("init_args", None) or {}
    module, _, name = str(path).rpartition(".")
    if given or not module:
        raise RecipeError(
            f"data.env.wrappers has {wrapper!r}; it must be a class path, or class_path and init_args with one"
        )
    try:
        made = cast(Callable[..., Any], getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError) as failure:
        raise RecipeError(f"data.env.wrappers: {path} cannot be imported ({_line(failure)})") from failure
    try:
        env = made(env, **arguments)
    except (error.Error, ImportError, TypeError) as failure:
        raise RecipeError(f"data.env.wrappers: {path} cannot be put around it ({_line(failure)})") from failure
    if not isinstance(env, Env):
        raise RecipeError(f"data.env.wrappers: {path} gives a {type(env).__name__}; it must give a gymnasium.Env")
    return env


def _line(failure: Exception) -> str:
    return " ".join(str(failure).split()) or type(failure).__name__
