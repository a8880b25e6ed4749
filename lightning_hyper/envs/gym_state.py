"""The state of a Gymnasium environment as plain data, as far as its attributes are plain data."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from gymnasium import Env, Wrapper

from lightning_hyper.envs.gym_spaces import to_observation

# What a run decides, not an episode.
NOT_KEPT = {"render_mode", "metadata", "_metadata", "_saved_kwargs"}
# Frames after which it is tried whether an environment can be put where another stands, and frames that follow.
BEFORE, AFTER = (1, 2, 4, 8, 16), 16


class ForeignError(TypeError):
    """A value is no plain data."""


def pack(value: Any) -> Any:
    """A value as what `torch.load(weights_only=True)` reads: numbers, strings, arrays and containers of these.

    Raises:
        ForeignError: it is something else.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple, deque, set):
        return {
            "kind": type(value).__name__,
            "items": [pack(item) for item in value],
            "most": getattr(value, "maxlen", None),
        }
    if type(value) is dict:
        return {"kind": "dict", "items": [[pack(key), pack(item)] for key, item in value.items()]}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        return {"kind": kind, "value": torch.from_numpy(np.array(value))}
    if isinstance(value, np.random.Generator):
        return {"kind": "generator", "state": pack(value.bit_generator.state)}
    raise ForeignError(type(value).__name__)


def unpack(plain: Any) -> Any:
    """The value that `pack` packed."""
    if not isinstance(plain, dict):
        return plain
    kind = plain["kind"]
    if kind in ("array", "scalar"):
        array = plain["value"].cpu().numpy()
        return array.copy() if kind == "array" else array[()]
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in plain["items"]}
    if kind == "generator":
        state = unpack(plain["state"])
        kind = getattr(np.random, state["bit_generator"], None)
        if not (isinstance(kind, type) and issubclass(kind, np.random.BitGenerator)):
            raise ForeignError(f"{state['bit_generator']} is no generator")
        generator = np.random.Generator(kind())
        generator.bit_generator.state = state
        return generator
    items = [unpack(item) for item in plain["items"]]
    return deque(items, plain["most"]) if kind == "deque" else {"list": list, "tuple": tuple, "set": set}[kind](items)


def snapshot(env: Env[Any, Any]) -> list[dict[str, Any]]:
    """The plain attributes of an environment and of its wrappers, from the outermost inwards."""
    found = []
    for layer in _layers(env):
        kept = {}
        for name, value in vars(layer).items():
            if name not in NOT_KEPT:
                try:
                    kept[name] = pack(value)
                except ForeignError:
                    continue
        found.append(kept)
    return found


def restore(env: Env[Any, Any], state: list[dict[str, Any]]) -> None:
    """Give an environment, made as the other was, the attributes that `snapshot` found."""
    for layer, kept in zip(_layers(env), state, strict=True):
        mine = vars(layer)
        for name, plain in kept.items():
            value, held = unpack(plain), mine.get(name)
            if isinstance(held, np.random.Generator) and type(value.bit_generator) is type(held.bit_generator):
                # Parts of the environment may hold the same generator.
                held.bit_generator.state = value.bit_generator.state
            else:
                mine[name] = value


def can_be_restored(make: Callable[[], Env[Any, Any]]) -> bool:
    """Try out, on environments made for it, whether one that is put where another stands goes on as that one does."""
    with seeded(0):
        one, other = make(), make()
        one.action_space.seed(0)
        try:
            return all(_goes_on(one, other, frames) for frames in BEFORE)
        finally:
            one.close()
            other.close()


def _goes_on(one: Env[Any, Any], other: Env[Any, Any], frames: int) -> bool:
    _play(one, frames)
    # At its start, so that it stands elsewhere however short the episodes are.
    other.reset(seed=2000)
    restore(other, snapshot(one))
    for _ in range(AFTER):
        action = one.action_space.sample()
        expected = _frame(one, action)
        try:
            found = _frame(other, action)
        # Whatever a state that is not whole leads to.
        except Exception:
            return False
        if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(expected, found, strict=True)):
            return False
        if expected[-1].any():
            break
    return True


def _play(env: Env[Any, Any], frames: int) -> None:
    """Play so many frames, and on to where no episode has just ended, if that comes soon."""
    env.reset(seed=1000)
    for frame in range(1, frames + AFTER):
        if _frame(env, env.action_space.sample())[-1].any():
            env.reset(seed=1000 + frame)
        elif frame >= frames:
            return


def _frame(env: Env[Any, Any], action: Any) -> tuple[Any, Any, Any]:
    observation, reward, terminated, truncated, _ = env.step(action)
    shown = to_observation(env.observation_space, observation)
    return shown, np.array(reward, dtype=np.float64), np.array([terminated, truncated])


def _layers(env: Any) -> Iterator[Any]:
    yield env
    while isinstance(env, Wrapper):
        env = env.env
        yield env


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators seeded within, and afterwards as they were."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
