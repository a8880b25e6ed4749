"""Checks of options, in the words of all error messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args


class RecipeError(ValueError):
    """A recipe that cannot be used; the message is one sentence that names its key."""


def one_of(key: str, value: object, names: Any) -> None:
    """Check that an option is one of some names.

    Args:
        key: the recipe's key, such as `data.env.reward`.
        value: what was given.
        names: a `Literal` type, or the names themselves.

    Raises:
        RecipeError: the value is none of the names.
    """
    choices = get_args(names) or tuple(names)
    if value not in choices:
        raise RecipeError(f"{key} is {value!r}; choose one of {', '.join(map(str, choices))}")


def positive(key: str, value: float | Sequence[float]) -> None:
    """Check that a number, or every number of a sequence, is above zero.

    Raises:
        RecipeError: it is not.
    """
    if isinstance(value, Sequence):
        if any(not number > 0 for number in value):
            raise RecipeError(f"{key} is {list(value)}; each must be positive")
    elif not value > 0:
        raise RecipeError(f"{key} is {value}; it must be positive")
