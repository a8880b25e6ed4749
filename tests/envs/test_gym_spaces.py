"""Spaces are described, flattened and acted in as gymnasium itself does it."""

import json

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Sequence, Text, Tuple
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array

from lightning_hyper.envs.gym_spaces import (
    choices,
    describe,
    observation_shape,
    rebuild,
    shown,
    to_action,
    to_observation,
)

VECTORS = {
    "box": Box(np.array([-1.0, -np.inf, 0.0]), np.array([2.0, np.inf, 0.5]), dtype=np.float64),
    "number": Box(0, 1, ()),
    "bytes": Box(0, 255, (4,), np.uint8),
    "discrete": Discrete(5, start=-2),
    "binary": MultiBinary([2, 3]),
    "multi": MultiDiscrete([[2, 3], [4, 5]]),
    "multi_start": MultiDiscrete([3, 2], start=[1, -1]),
    "tuple": Tuple((Discrete(3), Box(-1, 1, (2, 2)), MultiBinary(2))),
    "dict": Dict({"z": Discrete(3), "a": Tuple((Box(0, 9, (2,), np.int64), Discrete(2, start=7)))}),
    "ordered": Dict(z=Discrete(3), a=Dict(b=Box(-1, 1, (1, 2)))),
}
IMAGES = {
    "uint8": (Box(0, 255, (6, 5, 3), np.uint8), torch.uint8),
    "int16": (Box(-9, 9, (6, 5), np.int16), torch.int16),
    "float32": (Box(-1, 1, (2, 3, 4), np.float32), torch.float32),
    "float64": (Box(-1, 1, (2, 3), np.float64), torch.float32),
}


def sampled(space, count):
    space.seed(0)
    values = [space.sample() for _ in range(count)]
    return values, concatenate(space, values, create_empty_array(space, count))


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_are_gymnasiums_flattened_ones_alone_and_batched(name):
    space = VECTORS[name]
    values, batch = sampled(space, 20)
    assert batch_space(space, 20).contains(batch)
    found = to_observation(space, batch, batched=True)
    shape, dtype = observation_shape(space)
    assert (found.shape, found.dtype, dtype) == ((20, *shape), np.float32, torch.float32)
    for row, value in zip(found, values, strict=True):
        expected = np.asarray(gymnasium.spaces.flatten(space, value)).astype(np.float32)
        assert np.array_equal(row, expected)
        assert np.array_equal(to_observation(space, value), expected)
    assert len(np.unique(found, axis=0)) > 1


@pytest.mark.parametrize("name", IMAGES)
def test_images_keep_shape_and_kind(name):
    space, kind = IMAGES[name]
    values, batch = sampled(space, 3)
    assert observation_shape(space) == (space.shape, kind)
    found = to_observation(space, batch, batched=True)
    assert torch.from_numpy(found).dtype == kind
    for row, value in zip(found, values, strict=True):
        np.testing.assert_allclose(row, value, rtol=1e-6)
        assert np.array_equal(to_observation(space, value), row)
    # An array of its own: gymnasium writes the next one into the same place.
    batch[:] = 0
    assert found.any()


@pytest.mark.parametrize("name", [*VECTORS, *IMAGES])
def test_a_described_space_is_rebuilt_from_plain_text(name):
    space = VECTORS[name] if name in VECTORS else IMAGES[name][0]
    again = rebuild(json.loads(json.dumps(describe(space))))
    assert again == space
    values, _ = sampled(space, 3)
    for value in values:
        assert np.array_equal(to_observation(again, value), to_observation(space, value))
    if isinstance(space, Dict):
        assert list(again.spaces) == list(space.spaces)


def test_a_description_of_an_image_is_short():
    assert len(json.dumps(describe(Box(0, 255, (210, 160, 3), np.uint8)))) < 100


@pytest.mark.parametrize(
    "space", [Text(5), Dict(a=Discrete(2), b=Text(5)), Tuple((Sequence(Discrete(2)),)), Sequence(Box(0, 1)), Dict()]
)
def test_other_spaces_are_not_shown(space):
    assert not shown(space)
    assert all(shown(space) for space in VECTORS.values())


def test_actions_are_those_of_the_space():
    space = Discrete(3, start=5)
    assert choices(space) == 3
    assert to_action(space, np.array([0, 2])).tolist() == [5, 7]
    assert space.contains(to_action(space, np.array(1))[()])
    box = Box(np.array([[-1.0, 0.0], [2.0, -3.0]]), np.array([[1.0, 0.5], [4.0, 3.0]]), dtype=np.float64)
    low, high = choices(box)
    assert (low.tolist(), high.tolist()) == ([-1, 0, 2, -3], [1, 0.5, 4, 3])
    given = np.array([[-5, 0.25, 3, 9], [0, 9, 0, -1]], dtype=np.float32)
    taken = to_action(box, given)
    assert taken.dtype == np.float64
    assert taken.tolist() == [[[-1, 0.25], [3, 3]], [[0, 0.5], [2, -1]]]
    assert to_action(box, given[0]).tolist() == taken[0].tolist()
    assert box.contains(to_action(box, given[1]))
    assert to_action(Box(0, 4, (2,), np.uint8), np.array([2.6, 9])).tolist() == [3, 4]
    assert to_action(Box(-1, 1, ()), np.array([[0.5], [3]])).tolist() == [0.5, 1]


@pytest.mark.parametrize(
    "space",
    [MultiDiscrete([3, 2]), MultiBinary(2), Box(-np.inf, 1, (2,)), Box(np.array([0, 1.0]), np.ones(2)), Text(3)],
)
def test_other_actions_are_none(space):
    assert choices(space) is None
