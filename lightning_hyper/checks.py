"""What an argument may be: ranges and names that types carry, and the words of all refusals.

A constructor says in its types what it takes, `lr: Rate` or `hidden: Sequence[Width]`, and checks nothing of that by
itself: what a recipe gives is looked at before anything is made (`lightning_hyper.constructors`), what Python gives by
`checked`.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import re
import reprlib
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, Protocol, Union, cast, get_args, get_origin, get_type_hints

# What PyTorch and MuJoCo say.
TOO_LARGE = ("can't allocate memory", "CUDA out of memory", "size calculation overflowed", "Could not allocate memory")
Arguments = ParamSpec("Arguments")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message is one sentence that names its key."""


class Rule(Protocol):
    """What a value must hold to besides its type; goes into `Annotated`."""

    def holds(self, value: Any) -> bool:
        """Whether a value of the right type is allowed."""

    def words(self, kind: str) -> str:
        """What is allowed; `kind` is what the type is called."""


@dataclass(frozen=True)
class Range:
    """Finite numbers between two bounds, which count themselves.

    Args:
        low: lowest number.
        high: highest number; beyond it are slips of the pen.
        above: leave out the lowest itself.
    """

    low: float
    high: float
    above: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a number lies within."""
        return bool(math.isfinite(value) and self.low <= value <= self.high and not (self.above and value == self.low))

    def words(self, kind: str) -> str:
        """`a number above 0 and up to 1`."""
        return (
            f"{kind} above {self.low:,} and up to {self.high:,}"
            if self.above
            else f"{kind} from {self.low:,} to {self.high:,}"
        )


@dataclass(frozen=True)
class OneOf:
    """One of some names, such as the keys of a table."""

    names: Collection[str]

    def holds(self, value: Any) -> bool:
        """Whether it is one of them."""
        return value in self.names

    def words(self, kind: str) -> str:
        """`one of tanh, relu`."""
        return f"one of {', '.join(self.names)}"


@dataclass(frozen=True)
class Matching:
    """Texts of a form.

    Args:
        pattern: regular expression of the whole text.
        form: what it is in words.
    """

    pattern: str
    form: str

    def holds(self, value: Any) -> bool:
        """Whether the whole text has the form."""
        return re.fullmatch(self.pattern, value, flags=re.DOTALL) is not None

    def words(self, kind: str) -> str:
        """The form."""
        return self.form


Count = Annotated[int, Range(1, 1_000_000)]
Threads = Annotated[int, Range(1, 1_024)]
Copies = Annotated[int, Range(1, 4_096)]
"""Of what is an object, or a process, of its own."""
Width = Annotated[int, Range(1, 16_384)]
Layers = Annotated[int, Range(1, 100)]
Frames = Annotated[int, Range(1, 10**12)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Rate = Annotated[float, Range(0, 100, above=True)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]
Positive = Annotated[float, Range(0, 10**9, above=True)]
NonNegative = Annotated[float, Range(0, 10**9)]
Finite = Annotated[float, Range(-(10**9), 10**9)]


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what a type says; types of objects that a recipe cannot write take everything."""
    if (origin := get_origin(hint)) is Annotated:
        plain, *rules = get_args(hint)
        return fits(value, plain) and all(rule.holds(value) for rule in rules if hasattr(rule, "holds"))
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return any(value == name and type(value) is type(name) for name in get_args(hint))
    if hint is None or hint is type(None):
        return value is None
    if hint is bool or hint is str:
        return isinstance(value, hint)
    if hint is int or hint is float:
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if is_list(hint):
        item = (*get_args(hint), Any)[0]
        return isinstance(value, Sequence) and not isinstance(value, str) and all(fits(each, item) for each in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    return True


def is_list(hint: Any) -> bool:
    """Whether a type is that of lists of one kind."""
    origin = get_origin(hint) or hint
    return origin in (list, Sequence) or (origin is tuple and get_args(hint)[1:] == (...,))


def words(hint: Any) -> str:
    """What a type takes, after `it must be`."""
    if (origin := get_origin(hint)) is Annotated:
        plain, *rules = get_args(hint)
        said = words(plain)
        for rule in rules:
            said = rule.words(said) if hasattr(rule, "words") else said
        return said
    if origin in (Union, types.UnionType):
        *others, last = [words(option) for option in get_args(hint)]
        return f"{', '.join(others)} or {last}"
    if origin is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if is_list(hint):
        item = (*get_args(hint), Any)[0]
        return "a list" if item is Any else f"a list, each {words(item)}"
    if origin in (dict, Mapping) or hint is dict:
        return "a mapping"
    plain_words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    kind = f"a kind of {hint.__name__}" if inspect.isclass(hint) else str(hint)
    return plain_words.get(hint) or kind


_Short = reprlib.Repr()
_Short.maxstring = _Short.maxother = 60
_Short.maxlist = _Short.maxtuple = _Short.maxdict = 8


def shown(value: Any) -> str:
    """A value as a recipe writes it, cut where it is long."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = _Short.repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def refusal(key: str, value: Any, hint: Any) -> str:
    """The sentence that says that a value is not what a type says."""
    whole = isinstance(value, float) and abs(value) < 2**53 and value.is_integer() and fits(int(value), hint)
    return f"{key} is {shown(value)}; it must be {words(hint)}" + (f": write {int(value)}" if whole else "")


@functools.cache
def hints_of(init: Callable[..., Any]) -> dict[str, Any]:
    """The types of a function's arguments by name, with what they carry; none where they cannot be found."""
    try:
        return get_type_hints(inspect.unwrap(init), include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}


def checked(init: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Check what a constructor is given against its types.

    Raises:
        RecipeError: by the constructor; an argument that is not what its type says.
    """
    signature = inspect.signature(init)

    def look(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hints = hints_of(init)
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in hints and not fits(value, hints[name]):
                raise RecipeError(refusal(f"{type(args[0]).__name__}.{name}", value, hints[name]))

    def checking(*args: Any, **kwargs: Any) -> None:
        look(args, kwargs)
        init(*args, **kwargs)

    # With the names of the constructor's own module, by which the parser understands its types.
    own: Any = types.FunctionType(checking.__code__, cast(Any, init).__globals__, None, None, checking.__closure__)
    return cast(Callable[Arguments, None], functools.wraps(init)(own))


def require_memory(key: str, needed: int) -> None:
    """Refuse what needs more memory than the machine, or its share of it, has.

    Raises:
        RecipeError: it does.
    """
    there = memory()
    if there is not None and needed > there:
        gib = 2**30
        raise RecipeError(
            f"{key} asks for {needed / gib:,.0f} GiB of memory, and there are {there / gib:,.0f}; take less"
        )


def memory() -> int | None:
    """Bytes of memory of this machine, or of the container where that has fewer; None where it is not known."""
    found = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            found.append(int(Path(limit).read_text()))
    return min(found, default=None)


@contextmanager
def at(key: str) -> Iterator[None]:
    """Put a part's key before what it refuses of itself while it is made, and say it where memory does not suffice.

    Raises:
        RecipeError: both.
    """
    try:
        yield
    except RecipeError as error:
        said = str(error)
        if re.match(r"(model|data|trainer|checkpoint)\b", said):
            raise
        joint = "." if re.match(r"[\w.]+(:| is) ", said) else ": "
        raise RecipeError(f"{key}{joint}{said}") from error
    except Exception as error:
        if isinstance(error, MemoryError) or any(said in str(error) for said in TOO_LARGE):
            raise RecipeError(f"{key}: what its sizes ask for does not fit in memory; take smaller ones") from error
        raise
