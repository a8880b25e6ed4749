"""Gymnasium's spaces: as plain data, and between their values and what a network is given and gives."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from gymnasium import Space
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple, flatdim
from numpy.typing import NDArray

# Kinds of image that stay as they are; others become float32.
KEPT = {
    np.dtype(name): getattr(torch, name) for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "float32")
}


def describe(space: Space[Any]) -> dict[str, Any]:
    """A space as dictionaries, lists, strings and numbers, from which `rebuild` makes it again.

    Raises:
        ValueError: a kind of space that is not shown (see `shown`).
    """
    if isinstance(space, Box):
        edges = {"low": space.low, "high": space.high}
        # One number where all are the same, as in images.
        short = {
            key: edge.flat[0].item() if (edge == edge.flat[0]).all() else edge.tolist() for key, edge in edges.items()
        }
        return {"kind": "Box", **short, "shape": list(space.shape), "dtype": str(space.dtype)}
    if isinstance(space, Discrete):
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, MultiBinary):
        return {"kind": "MultiBinary", "n": np.array(space.n).tolist()}
    if isinstance(space, MultiDiscrete):
        return {"kind": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": space.start.tolist()}
    if isinstance(space, Dict):
        # A list, as the order of the parts is the order of the features.
        return {"kind": "Dict", "spaces": [[key, describe(part)] for key, part in space.spaces.items()]}
    if isinstance(space, Tuple):
        return {"kind": "Tuple", "spaces": [describe(part) for part in space.spaces]}
    raise ValueError(f"the space {space} is none of Box, Discrete, MultiBinary, MultiDiscrete, Dict and Tuple")


def rebuild(plain: dict[str, Any]) -> Space[Any]:
    """The space that `describe` described."""
    kind = plain["kind"]
    if kind == "Box":
        shape, dtype = tuple(plain["shape"]), np.dtype(plain["dtype"])
        low, high = (np.broadcast_to(np.array(plain[key], dtype), shape) for key in ("low", "high"))
        return Box(low, high, shape, dtype.type)
    if kind == "Discrete":
        return Discrete(plain["n"], start=plain["start"])
    if kind == "MultiBinary":
        return MultiBinary(plain["n"])
    if kind == "MultiDiscrete":
        return MultiDiscrete(np.array(plain["nvec"]), start=np.array(plain["start"]))
    if kind == "Dict":
        return Dict(OrderedDict((key, rebuild(part)) for key, part in plain["spaces"]))
    return Tuple([rebuild(part) for part in plain["spaces"]])


def shown(space: Space[Any]) -> bool:
    """Whether observations of this space can be shown: Box, Discrete, MultiBinary, MultiDiscrete, Dict and Tuple."""
    if isinstance(space, Dict | Tuple):
        parts = space.spaces.values() if isinstance(space, Dict) else space.spaces
        return len(space.spaces) > 0 and all(shown(part) for part in parts)
    return isinstance(space, Box | Discrete | MultiBinary | MultiDiscrete)


def is_image(space: Space[Any]) -> bool:
    """Whether an observation keeps its shape: it is a single array of at least two dimensions."""
    return isinstance(space, Box) and len(space.shape) > 1


def observation_shape(space: Space[Any]) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of one `observation`: an image's own, or float32 features."""
    if isinstance(space, Box) and is_image(space):
        return space.shape, KEPT.get(space.dtype, torch.float32)
    return (flatdim(space),), torch.float32


def is_single(space: Space[Any], value: Any) -> bool:
    """Whether a value is one observation of a space, and not several stacked as gymnasium stacks them."""
    if isinstance(space, Dict):
        key, part = next(iter(space.spaces.items()))
        return is_single(part, value[key])
    if isinstance(space, Tuple):
        return is_single(space.spaces[0], value[0])
    return np.ndim(value) == len(space.shape or ())


def to_observation(space: Space[Any], value: Any, *, batched: bool = False) -> NDArray[Any]:
    """What `observation` shows of a value, as an array of its own.

    Args:
        space: the environment's observation space.
        value: an observation of it, or several stacked as gymnasium stacks them.
        batched: whether they are several.

    Returns:
        `[*shape]`, or `[num_envs, *shape]`: an image as it is, anything else as float32 features in the order of
        `gymnasium.spaces.flatten`, an index as one-hot.
    """
    if is_image(space):
        return np.array(value, dtype=space.dtype if space.dtype in KEPT else np.float32)
    features = _features(space, value, batched)
    return features if batched else features[0]


def _features(space: Space[Any], value: Any, batched: bool) -> NDArray[np.float32]:
    if isinstance(space, Dict):
        return np.concatenate([_features(part, value[key], batched) for key, part in space.spaces.items()], axis=1)
    if isinstance(space, Tuple):
        pairs = zip(space.spaces, value, strict=True)
        return np.concatenate([_features(part, entry, batched) for part, entry in pairs], axis=1)
    array = np.asarray(value) if batched else np.asarray(value)[None]
    array = array.reshape(len(array), -1)
    if isinstance(space, Discrete):
        one_hot: NDArray[np.float32] = (array - space.start == np.arange(space.n)).astype(np.float32)
        return one_hot
    if isinstance(space, MultiDiscrete):
        array = array - space.start.reshape(-1)
        indices = [array[:, [i]] == np.arange(n) for i, n in enumerate(space.nvec.flat)]
        return np.concatenate(indices, axis=1).astype(np.float32)
    return array.astype(np.float32)


def choices(space: Space[Any]) -> int | tuple[torch.Tensor, torch.Tensor] | None:
    """How many actions there are to choose from, or their lowest and highest values, `[actions]`; None for others."""
    if isinstance(space, Discrete):
        return int(space.n)
    if isinstance(space, Box) and space.is_bounded() and (space.low < space.high).all():
        low, high = (torch.from_numpy(edge.reshape(-1).astype(np.float32)) for edge in (space.low, space.high))
        return low, high
    return None


def to_action(space: Space[Any], value: Any) -> NDArray[Any]:
    """What the environment's `step` takes, from an action of ours.

    Args:
        space: the environment's action space.
        value: an index, or `[actions]`; or several, `[num_envs]` or `[num_envs, actions]`.

    Returns:
        The index counted from the space's start, or an array of its shape and dtype, clipped to its bounds.
    """
    value = np.asarray(value)
    if isinstance(space, Discrete):
        index: NDArray[Any] = (value + space.start).astype(space.dtype)
        return index
    box: Any = space
    whole = value.reshape(*value.shape[:-1], *box.shape).clip(box.low, box.high)
    taken: NDArray[Any] = (np.rint(whole) if box.dtype.kind in "iu" else whole).astype(box.dtype)
    return taken
