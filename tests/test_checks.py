"""Checks of arguments: what a type says is what a value must be, and what the refusal says."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import pytest
from jsonargparse import ArgumentParser

from lightning_hyper import checks
from lightning_hyper.checks import (
    Count,
    Matching,
    OneOf,
    PositiveShare,
    Range,
    RecipeError,
    Share,
    at,
    checked,
    fits,
    refusal,
    require_memory,
)

Name = Annotated[str, OneOf(["tanh", "relu"])]
FITTING = [
    (1, Count),
    (10**6, Count),
    (0, Share),
    (1.0, PositiveShare),
    ([1, 2], Sequence[Count]),
    ((), Sequence[Count]),
    (None, Count | None),
    ("tanh", Name),
    ("a", Literal["a", 1]),
    (1, Literal["a", 1]),
    ("a-b", Annotated[str, Matching("[a-z-]+", "small letters")]),
    ({"a": 1}, dict[str, Any]),
    ({}, Mapping[str, int]),
    (True, bool),
    (5, Any),
    (print, Callable[[], int]),
]
OTHERS = [
    (0, Count),
    (10**6 + 1, Count),
    (True, Count),
    (1.0, Count),
    (None, Count),
    ("1", Count),
    (0, PositiveShare),
    (1.1, Share),
    (math.nan, Share),
    (math.inf, Annotated[float, Range(0, math.inf)]),
    ([1, 0], Sequence[Count]),
    ("12", Sequence[str]),
    (1, Sequence[Count]),
    (0, Count | None),
    ("elu", Name),
    (True, Literal["a", 1]),
    ("a b", Annotated[str, Matching("[a-z-]+", "small letters")]),
    ([], dict[str, Any]),
    (1, bool),
]


@pytest.mark.parametrize(("value", "hint"), FITTING)
def test_what_a_type_says_fits(value, hint):
    assert fits(value, hint)


@pytest.mark.parametrize(("value", "hint"), OTHERS)
def test_what_a_type_does_not_say_does_not_fit(value, hint):
    assert not fits(value, hint)


@pytest.mark.parametrize(
    ("value", "hint", "said"),
    [
        (0, Count, "a is 0; it must be a whole number from 1 to 1,000,000"),
        (None, PositiveShare, "a is null; it must be a number above 0 and up to 1"),
        (1e4, Count | None, "a is 10000.0; it must be a whole number from 1 to 1,000,000 or null: write 10000"),
        (("a",), Sequence[Name], "a is ['a']; it must be a list, each one of tanh, relu"),
        (True, Literal["x", "y"], "a is true; it must be one of x, y"),
        ([1] * 99, str, "a is [1, 1, 1, 1, 1, 1, 1, 1, ...]; it must be a text"),
    ],
)
def test_a_refusal_says_what_was_given_and_what_would_be_right(value, hint, said):
    assert refusal("a", value, hint) == said


class Thing:
    @checked
    def __init__(self, size: Count, *, names: Sequence[Name] = (), **others: Any) -> None:
        self.given = (size, names, others)


def test_a_checked_constructor_refuses_what_its_types_do():
    assert Thing(2, names=["relu"], more=-1).given == (2, ["relu"], {"more": -1})
    with pytest.raises(RecipeError, match=r"^Thing.size is 0; it must be a whole number"):
        Thing(0)
    with pytest.raises(RecipeError, match=r"^Thing.names is \['x'\]; it must be a list"):
        Thing(size=1, names=["x"])
    with pytest.raises(TypeError, match="size"):
        Thing()


class Rule:
    """A class of a name that the module of the checks has for another."""


class Ruled:
    @checked
    def __init__(self, rule: "Rule | None" = None, size: "Count" = 1) -> None:
        self.rule, self.size = rule, size


def test_types_of_a_checked_constructor_mean_what_they_do_in_its_module():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Ruled, "ruled")
    made = parser.instantiate(parser.parse_object({"ruled": {"rule": {"class_path": f"{__name__}.Rule"}}})).ruled
    assert isinstance(made.rule, Rule)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("width is 3; no", "model.context.encoder.width is 3; no"),
        ("trunk.width: no", "model.context.encoder.trunk.width: no"),
        ("GRU has no context", "model.context.encoder: GRU has no context"),
        ("data.env: no", "data.env: no"),
    ],
)
def test_what_a_part_refuses_has_the_key_of_its_place(said, expected):
    with pytest.raises(RecipeError) as error, at("model.context"), at("encoder"):
        raise RecipeError(said)
    assert str(error.value) == expected


def test_what_does_not_fit_in_memory_is_a_fault_of_its_sizes(monkeypatch):
    with (
        pytest.raises(RecipeError, match=r"^model.actor: what its sizes ask for does not fit in memory"),
        at("model.actor"),
    ):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
    with pytest.raises(RuntimeError, match="other"), at("model.actor"):
        raise RuntimeError("other")
    monkeypatch.setattr(checks, "memory", lambda: 2**30)
    require_memory("data.capacity", 2**30)
    with pytest.raises(RecipeError, match=r"^data.capacity asks for 2 GiB of memory, and there are 1"):
        require_memory("data.capacity", 2**31)
