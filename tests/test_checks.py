"""Checks of options: what is wrong is said by the recipe's key."""

from typing import Literal

import pytest

from lightning_hyper.checks import RecipeError, one_of, positive


def test_one_of_takes_names_or_a_literal_type():
    for names in (("a", "b"), {"a": 1, "b": 2}, Literal["a", "b"]):
        one_of("model.x", "b", names)
        with pytest.raises(RecipeError, match=r"^model.x is 'c'; choose one of a, b$"):
            one_of("model.x", "c", names)


@pytest.mark.parametrize("value", [1, 0.5, [1, 2], (), float("inf")])
def test_positive_numbers_pass(value):
    positive("model.x", value)


@pytest.mark.parametrize("value", [0, -1, 0.0, [1, 0], (-1,), float("nan")])
def test_other_numbers_name_the_key(value):
    with pytest.raises(RecipeError, match=r"^model.x is .*must be positive$"):
        positive("model.x", value)
