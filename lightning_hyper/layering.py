"""Recipes as dictionaries: read as YAML, merged layer over layer, the command line last; needs nothing heavy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped, unused-ignore]

from lightning_hyper.checks import RecipeError
from lightning_hyper.settings import KEYS, OPTIONAL, TEXTS

OWN = ("config", "ckpt_path", "trust", "print_config", "help")  # options of commands that are no keys
DEPTH = 40  # of a recipe, beyond what any needs
SIZE = 100_000  # values of a recipe, with what aliases stand for
PART = ("class_path", "init_args", "dict_kwargs")  # the keys of what names a class


class Where(NamedTuple):
    """A key of a file or of the command line, for messages."""

    source: str
    key: str = ""

    def __truediv__(self, key: object) -> Where:
        return Where(self.source, f"{self.key}.{key}" if self.key else str(key))

    def __str__(self) -> str:
        return f"{self.source}: key `{self.key}`"


def merge(earlier: Mapping[str, Any], later: Mapping[str, Any], where: Where) -> dict[str, Any]:
    """Return two layers as one; where both give a value, the later one's is kept.

    Mappings merge key by key, except that another class takes nothing of the earlier class's arguments; a key that
    ends in `+` appends its list to the earlier list. A class's name alone, `encoder: GRU`, is short for its mapping.

    Raises:
        RecipeError: something is appended to what is no list, or is no list itself.
    """
    if "class_path" in earlier and not _same_class(earlier["class_path"], later.get("class_path")):
        earlier = {}
    merged = dict(earlier)
    for key, value in later.items():
        if isinstance(key, str) and key.endswith("+"):
            before = merged.get(key[:-1]) or []
            if not isinstance(value, list) or not isinstance(before, list):
                fault = value if not isinstance(value, list) else before
                raise RecipeError(f"{where / key} appends a list to a list, but found {fault!r}")
            merged[key[:-1]] = [*before, *_merged(None, value, where / key)]
        else:
            merged[key] = _merged(merged.get(key), value, where / key)
    return merged


def _merged(before: Any, value: Any, where: Where) -> Any:
    """Return one value of a layer over the value of the layers below it, sharing nothing mutable with its file."""
    if isinstance(value, str) and isinstance(before, dict) and "class_path" in before:
        value = {"class_path": value}
    elif isinstance(before, str) and isinstance(value, dict) and "init_args" in value:
        before = {"class_path": before}
    if isinstance(value, dict):
        return merge(before if isinstance(before, dict) else {}, value, where)
    return [_merged(None, item, where) for item in value] if isinstance(value, list) else value


def _same_class(earlier: object, later: object) -> bool:
    """Whether a layer means the class of an earlier one: it names none, or the same, with or without its module."""
    if later is None or earlier == later:
        return True
    names = f"{earlier}", f"{later}"
    return not all("." in name for name in names) and len({name.rpartition(".")[2] for name in names}) == 1


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by their dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        branch = isinstance(value, Mapping) and value
        leaves |= flatten(value, f"{prefix}{key}.") if branch else {f"{prefix}{key}": value}
    return leaves


def override(recipe: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """Return a recipe with the options of a command line as its last layers, one after the other.

    `--key value` and `--key=value` set a key of the recipe, read as YAML; dots lead deeper, with or without
    `init_args`: `--model.lr 1e-3`. The name of a class exchanges a part (`--model PPO`), `--trainer.callbacks+=X`
    appends to a list, and a key below a list is one of its last item, or of the item at an index
    (`--trainer.callbacks.0.every 100`).

    Raises:
        RecipeError: an option is unknown or lacks its value, or its key leads nowhere.
    """
    merged = merge({}, recipe, Where("recipe"))
    for key, text in _options(arguments):
        path = key.split(".")
        if path[0].removesuffix("+") not in KEYS:
            raise RecipeError(f"--{key}: a recipe has no key {path[0]!r}; {_meant(key, merged)}")
        if len(path) > DEPTH:
            raise RecipeError(f"--{'.'.join(path[:3])}...: a key has at most {DEPTH} parts, and this one {len(path)}")
        value = _value(key, text)
        if path[-1].endswith("+") and not isinstance(value, list):
            value = [value]
        merged = merge(merged, _layer(merged, path, value, key), Where("command line"))
    return merged


def _meant(key: str, recipe: Mapping[str, Any]) -> str:
    """Return what an unknown option may stand for: a key that it begins, one that ends in it, or the closest one."""
    deep = [path.replace(".init_args", "") for path in flatten(recipe)]
    found = [
        *(known for known in (*OWN, *KEYS) if known.startswith(key)),
        *(path for path in deep if path.endswith(f".{key}")),
        *difflib.get_close_matches(key, [*OWN, *KEYS], n=1),
        *difflib.get_close_matches(key, deep, n=1, cutoff=0.8),
    ]
    meant = list(dict.fromkeys(f"--{each}" for each in found))[:3]
    return f"did you mean {' or '.join(meant)}?" if meant else f"known are {', '.join(KEYS)}"


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    words = iter(arguments)
    for word in words:
        key, equals, text = word[2:].partition("=")
        if not word.startswith("--") or not all(key.split(".")):
            raise RecipeError(f"{word!r} is no option; options are such as --model.lr 1e-3 or --model.lr=1e-3")
        following = text if equals else next(words, "")
        if (not equals and following.startswith("--")) or (not following and key not in TEXTS):
            raise RecipeError(f"--{key} needs a value, such as --{key} 1, or null")
        yield key, following


def _value(key: str, text: str) -> Any:
    if key in TEXTS:
        return None if text == "null" and key in OPTIONAL else text
    try:
        return read(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--{key}: {text[:60]!r} is no YAML: {getattr(error, 'problem', error)}") from None


def _layer(place: Any, path: Sequence[str], value: Any, key: str) -> Any:
    """Return what has to be merged into a place of a recipe so that the key that a path leads to gets a value."""
    if not path:
        return value
    step, *rest = path
    if isinstance(place, list):
        index, below = (int(step), rest) if step.isdigit() else (len(place) - 1, path)
        if not 0 <= index < len(place):
            raise RecipeError(f"--{key}: the list there has {len(place)} item(s), and none at {step!r}")
        item = _merged(place[index], _layer(place[index], below, value, key), Where("command line", key))
        return [*place[:index], item, *place[index + 1 :]]
    if isinstance(place, str):
        place = {"class_path": place}
    if place is not None and not isinstance(place, dict):
        raise RecipeError(f"--{key}: {place!r} is there, in which there is no key {step!r}")
    place = place or {}
    if step not in PART and not place.keys().isdisjoint(PART):
        return {"init_args": _layer(place.get("init_args"), path, value, key)}
    return {step: _layer(place.get(step), rest, value, key)}


# The C parser is some ten times faster, which a listing of many recipes shows.
Loader: Any = type("Loader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {})
Dumper: Any = type("Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda self, data: True})

# YAML 1.1 takes 1e-4 for a string, because it lacks a dot.
for _class in (Loader, Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def read(text: str) -> Any:
    """Return what YAML says; nothing of it is made before it is known to be of a size that a recipe can have.

    Raises:
        yaml.YAMLError: it is no YAML, gives a key twice, is nested too deeply, or has aliases that stand for too much.
    """
    depth = 0
    event: Any
    for event in yaml.parse(text, Loader=Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH:
            raise yaml.MarkedYAMLError(problem=f"it is nested more than {DEPTH} deep", problem_mark=event.start_mark)
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if (size := _size(node, {})) == float("inf"):
            raise yaml.MarkedYAMLError(problem="an alias stands for what it is a part of")
        if size > SIZE:
            raise yaml.MarkedYAMLError(
                problem=f"with its aliases it stands for {size:,.0f} values, more than the {SIZE:,} of any recipe"
            )
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _size(node: Any, known: dict[int, float]) -> float:
    """Return how many values a node stands for where every alias is written out; infinite for one within itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_size(part, known) for part in parts))
    return known[id(node)]


def problem(error: yaml.YAMLError) -> str:
    """Return what a YAML parser complains of, with the place, in one line."""
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{place}{getattr(error, 'problem', None) or ' '.join(str(error).split())}"


def dump(recipe: Mapping[str, Any]) -> str:
    """Return a recipe as YAML."""
    # Innermost mappings and lists on one line, as recipes are written; but never the whole recipe.
    flow = None if any(isinstance(value, dict | list) for value in recipe.values()) else False
    return str(yaml.dump(dict(recipe), Dumper=Dumper, sort_keys=False, default_flow_style=flow, width=110))


def _mapping_without_duplicates(loader: Any, node: Any) -> dict[str, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        # Two `<<` are two merges, not one key twice.
        if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
            raise yaml.MarkedYAMLError(problem=f"key `{key.value}` is given twice", problem_mark=key.start_mark)
        if isinstance(key.value, str):
            seen.add(key.value)
    loader.flatten_mapping(node)
    mapping: dict[str, Any] = loader.construct_mapping(node, deep=True)
    return mapping


def _readable_integer(dumper: Any, number: int) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:int", f"{number:_}" if abs(number) >= 100_000 else str(number))


Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)
Dumper.add_representer(int, _readable_integer)
