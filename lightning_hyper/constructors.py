"""What the classes that a recipe names take, held against what it gives them, before anything is made.

The types of the constructors say it all: which class goes where, which arguments it has, which numbers they may be.
Every fault is one sentence with the recipe's own key. What a type cannot say is left to the parser and to the classes.
"""

from __future__ import annotations

import difflib
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from jsonargparse import ArgumentParser
from jsonargparse._common import ImportDenied
from jsonargparse._util import import_object
from torch import nn

from lightning_hyper.algorithms import Algorithm
from lightning_hyper.checks import RecipeError, fits, hints_of, is_list, refusal, shown
from lightning_hyper.experience import Experience
from lightning_hyper.layering import PART
from lightning_hyper.settings import Settings

PARTS = {"model": Algorithm, "data": Experience}


class Fault(NamedTuple):
    """What is wrong, and how much the value is like what a type takes: of several types the nearest one's is said."""

    nearness: int
    said: str


def check(recipe: Mapping[str, Any], names: Mapping[str, str], groups: Mapping[str, type[Any]]) -> None:
    """Check a recipe, or a part of one.

    Args:
        recipe: merged recipe.
        names: paths of this package's classes by their short names.
        groups: classes whose arguments stand below a key without `class_path`.

    Raises:
        RecipeError: a key, class or value that nothing takes.
    """
    look, settings = _Look(names), hints_of(Settings.__init__)
    known = [*PARTS, *groups, *(field.name for field in fields(Settings))]
    for key, value in recipe.items():
        found: Fault | None
        if key in groups:
            found = look.arguments(key, value, groups[key], 0)
        elif key in PARTS or key in settings:
            found = look.fault(key, value, PARTS.get(key) or settings[key])
        else:
            found = Fault(0, f"{key}: a recipe has no such key; {near(key, known)}")
        if found is not None:
            raise RecipeError(found.said)


def near(name: object, known: Sequence[str]) -> str:
    """The closest of the known names, or else all of them, to go behind a complaint."""
    close = difflib.get_close_matches(str(name), known, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"known are {', '.join(known)}" if len(known) < 9 else "there is none like it"


class _Look:
    """Looks for faults; None is none."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names

    def fault(self, key: str, value: Any, hint: Any, default: Any = None) -> Fault | None:
        """The fault of a value at a key where a type is wanted; `default` is the argument's own."""
        plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        origin = get_origin(plain)
        if origin in (Union, types.UnionType):
            found = [self.fault(key, value, option, default) for option in get_args(plain)]
            if None in found:
                return None
            nearest = max((each for each in found if each is not None), key=lambda each: each.nearness)
            return nearest if nearest.nearness else Fault(0, refusal(key, value, hint))
        if origin is Callable or origin is types.FunctionType or plain is Callable:
            return self.factory(key, value, plain, default)
        if is_list(plain) and isinstance(value, Sequence) and not isinstance(value, str):
            item = (*get_args(plain), Any)[0]
            inside = [self.fault(f"{key}.{k}", each, item) for k, each in enumerate(value)]
            deepest = max((each for each in inside if each is not None), key=lambda each: each.nearness, default=None)
            if deepest is not None and (deepest.nearness or fits(value, hint)):
                return Fault(deepest.nearness + 1, deepest.said)
        if inspect.isclass(plain) and _is_part(plain):
            return self.part(key, value, plain, (), default)
        return None if fits(value, hint) else Fault(0, refusal(key, value, hint))

    def factory(self, key: str, value: Any, hint: Any, default: Any) -> Fault | None:
        """The fault of what is to make a part from some arguments that the package gives it."""
        given, made = (*get_args(hint), None, None)[:2]
        if not (inspect.isclass(made) and _is_part(made)):
            return None
        return self.part(key, value, made, tuple(given) if isinstance(given, list) else (), default)

    def part(self, key: str, value: Any, base: Any, given: tuple[Any, ...], default: Any = None) -> Fault | None:
        """The fault of what is to name a class, a kind of `base` that is made from values of the `given` types."""
        kind = f"a class, a kind of {base.__name__}"
        if isinstance(value, str):
            value = {"class_path": value}
        if not isinstance(value, Mapping):
            return Fault(0, f"{key} is {shown(value)}; it must name {kind}")
        if extra := [name for name in value if name not in PART]:
            close = difflib.get_close_matches(str(extra[0]), PART, n=1)
            hint = f"did you mean {close[0]}?" if close else "a class has class_path, and its arguments below init_args"
            return Fault(1, f"{key}.{extra[0]}: no such key; {hint}")
        path = value.get("class_path")
        if path is None and inspect.isclass(default) and value:
            cls: Any = default
        elif not isinstance(path, str):
            return Fault(1, f"{key}.class_path is {shown(path)}; it must name {kind}")
        else:
            cls = self.named(path, base)
        if cls is None:
            kinds = [name for name in self.names if issubclass(_own(self.names[name]), base)]
            last = str(path).rpartition(".")[2]
            close = difflib.get_close_matches(last, kinds, n=1) or difflib.get_close_matches(last, self.names, n=1)
            meant = f"; did you mean {close[0]}?" if close else f"; {self.kinds(base, given)}"
            return Fault(1, f"{key}: there is no class {shown(path)}{meant}")
        if not inspect.isclass(cls):
            return None if callable(cls) else Fault(1, f"{key}: {path} is no class; it must name {kind}")
        if not issubclass(cls, base):
            return Fault(1, f"{key}: {cls.__name__} is no {base.__name__}; {self.kinds(base, given)}")
        if inspect.isabstract(cls):
            return Fault(1, f"{key}: {cls.__name__} is what several classes share; {self.kinds(base, given)}")
        made: Any = cls
        if not _takes(made, given):
            return Fault(1, f"{key}: {cls.__name__} cannot be made from what it gets there; {self.kinds(base, given)}")
        arguments = value.get("init_args")
        inner = None if arguments is None else self.arguments(key, arguments, cls, len(given))
        if inner is None and cls.__module__.startswith("lightning_hyper."):
            inner = self.arguments(key, value.get("dict_kwargs") or {}, cls, len(given))
        return None if inner is None else Fault(inner.nearness + 2, inner.said)

    def arguments(self, key: str, given: Any, cls: Any, positionals: int) -> Fault | None:
        """The fault of the arguments that a class is given besides the first so many."""
        if not isinstance(given, Mapping):
            return Fault(0, f"{key} is {shown(given)}; it must be a mapping of the arguments of {cls.__name__}")
        accepted = _accepted(cls, positionals)
        for name, value in given.items():
            if name not in accepted:
                return Fault(1, f"{key}.{name}: {cls.__name__} takes no such argument; {near(name, accepted)}")
            hint, default = _argument(cls, name)
            found = self.fault(f"{key}.{name}", value, hint, default)
            if found is not None:
                return found
        return None

    def kinds(self, base: Any, given: tuple[Any, ...]) -> str:
        """Some classes of this package that would do."""
        classes = {name: _own(path) for name, path in self.names.items()}
        some = [
            name
            for name, cls in classes.items()
            if issubclass(cls, base) and not inspect.isabstract(cls) and _takes(cls, given)
        ]
        return f"take one such as {', '.join(some[:5])}" if some else f"it must name a class, a kind of {base.__name__}"

    def named(self, path: str, base: Any) -> Any:
        """What a path or short name stands for; None where there is nothing."""
        if "." in path:
            return _imported(path)
        if path in self.names and issubclass(ours := _own(self.names[path]), base):
            return ours
        return next((cls for cls in subclasses(base) if cls.__name__ == path), None) or (
            _own(self.names[path]) if path in self.names else None
        )


def subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    """A class and all that derive from it."""
    yield cls
    for subclass in type.__subclasses__(cls):
        yield from subclasses(subclass)


def _own(path: str) -> Any:
    """A class of this package."""
    return import_object(path, check_path=False)


def _imported(path: str) -> Any:
    """What a path leads to; None where there is nothing. What may not be imported is left to the parser to say."""
    module = path.rpartition(".")[0]
    try:
        return import_object(path)
    except ImportDenied:
        return _left_to_the_parser
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # of a module that is there, and lacks one itself
    except (AttributeError, ValueError):
        pass
    return None


def _left_to_the_parser() -> None: ...


def _is_part(cls: type[Any]) -> bool:
    """Whether a type is one of objects that a recipe names by their class."""
    root = cls.__module__.partition(".")[0]
    return issubclass(cls, nn.Module) or (root not in sys.stdlib_module_names and root not in ("torch", "numpy"))


@cache
def _accepted(cls: Any, positionals: int) -> list[str]:
    """Names of the arguments of a class besides the first so many, those that it hands on included."""
    added = ArgumentParser(exit_on_error=False).add_class_arguments(cls, skip={positionals}, fail_untyped=False)
    return [str(name) for name in added]


@cache
def _argument(cls: Any, name: str) -> tuple[Any, Any]:
    """Type and default of an argument, from the class that has it by name; Any where there is no type."""
    for each in cls.__mro__:
        init: Any = vars(each).get("__init__")
        if init is None:
            continue
        parameters = inspect.signature(inspect.unwrap(init)).parameters
        if name in parameters:
            return hints_of(init).get(name, Any), parameters[name].default
    return Any, None


@cache
def _takes(cls: Any, given: tuple[Any, ...]) -> bool:
    """Whether a class can be made from arguments of some types without a name, and needs no more of them."""
    if cls.__init__ is nn.Module.__init__:  # which takes anything by its signature, and nothing in truth
        return not given
    parameters = list(inspect.signature(inspect.unwrap(cls.__init__)).parameters.values())[1:]
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return True
    places = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    return len(places) >= len(given) and all(
        _holds(_argument(cls, place.name)[0], hint) for place, hint in zip(places, given, strict=False)
    )


def _holds(wide: Any, narrow: Any) -> bool:
    """Whether values of a type go where another is wanted; what cannot be told does."""
    wide = get_args(wide)[0] if get_origin(wide) is Annotated else wide
    if wide is Any:
        return True
    if get_origin(wide) in (Union, types.UnionType):
        return any(_holds(option, narrow) for option in get_args(wide))
    if get_origin(wide) is Callable:
        return get_origin(narrow) is Callable
    if is_list(wide) or is_list(narrow):
        return is_list(wide) and is_list(narrow)
    if inspect.isclass(wide) and inspect.isclass(narrow):
        return issubclass(narrow, wide) and wide is not bool
    return True
