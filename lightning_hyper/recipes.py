"""Recipes: YAML files that name an experience source, an algorithm and its parts; found, layered, listed and copied.

This module needs nothing heavier than a YAML parser, so that listing recipes is immediate.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped, unused-ignore]

__all__ = ["RecipeError", "Row", "copy", "folder", "listing", "names", "resolve", "show"]

NOT_MEASURED = "not measured yet"


class RecipeError(ValueError):
    """A recipe that cannot be found, read or merged; the message is one sentence that names it."""


class Row(NamedTuple):
    """One line of the listing: what a shipped recipe is about and the result measured with it."""

    name: str
    paper: str
    method: str
    environment: str
    measured: str


def folder() -> Path:
    """Return the folder of the shipped recipes: inside an installed wheel, else beside the package of a checkout.

    Raises RecipeError if neither is there.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package / "_recipes", package.parent / "recipes"):
        if candidate.is_dir():
            return candidate
    raise RecipeError(f"no recipes are shipped with this installation (looked in {package / '_recipes'})")


def names() -> list[str]:
    """Return the names of the shipped recipes, sorted; parts starting with `_` are layers and are left out."""
    root = folder()
    found = (path.relative_to(root).with_suffix("") for path in root.rglob("*.yaml"))
    return sorted(name.as_posix() for name in found if not any(part.startswith("_") for part in name.parts))


def resolve(names_or_paths: Sequence[str]) -> dict[str, Any]:
    """Load recipes with their layers and merge them in order; where two give a value, the later one's is kept.

    Mappings merge key by key, except that another `class_path` replaces the earlier part with all its arguments;
    a key ending in `+` appends its list to the earlier list. Raises RecipeError.
    """
    if isinstance(names_or_paths, str):
        names_or_paths = [names_or_paths]
    merged: dict[str, Any] = {}
    for name in names_or_paths:
        # A layer shared by two layers of one recipe counts once, so the second mention does not undo what lies between.
        for path in _with_layers(_find(name), ()):
            document = {key: value for key, value in _read(path).items() if key != "layers"}
            merged = _merge(merged, document, _Where(path))
    return merged


def listing() -> list[Row]:
    """Return one row for each shipped recipe; raises RecipeError if one of them cannot be read."""
    rows = []
    for name in names():
        recipe = resolve([name])
        paper, method, environment = (str(recipe.get(key, "")) for key in ("paper", "method", "environment"))
        rows.append(Row(name, paper, method, environment, _measured(_header(_find(name)))))
    return rows


def show(name: str) -> str:
    """Return the header comment of a recipe and its merged YAML, layers included; raises RecipeError."""
    recipe = resolve([name])
    # Innermost mappings and lists on one line, as recipes are written; but never the whole recipe.
    flow = None if any(isinstance(value, dict | list) for value in recipe.values()) else False
    merged = yaml.dump(recipe, Dumper=_Dumper, sort_keys=False, default_flow_style=flow, width=110)
    return "".join(f"{line}\n" for line in _header(_find(name))) + str(merged)


def copy(name: str, destination: str | Path | None = None) -> Path:
    """Write a recipe, whole, to a file or into a folder and return the path: by default `<last part>.yaml` here.

    Raises RecipeError if the recipe is unknown, or if the file exists or cannot be written.
    """
    text = show(name)
    file_name = _find(name).stem + ".yaml"
    target = Path(destination) if destination is not None else Path(file_name)
    if target.is_dir():
        target /= file_name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"{target} exists and is not overwritten; name another destination") from None
    except OSError as error:
        raise RecipeError(f"cannot write the recipe to {target}: {error.strerror}") from None
    return target


# --- finding and reading ---------------------------------------------------------------------------------------------


def _find(name: str, beside: Path | None = None) -> Path:
    """Return the file of a path (relative to the file `beside`, if given) or of a shipped name."""
    path = (beside.parent if beside else Path()) / name
    shipped = folder() / name
    for candidate in (path, _suffixed(path) if beside else path, shipped, _suffixed(shipped)):
        if candidate.is_file():
            return candidate
    asked_by = f" (a layer of {beside})" if beside else ""
    if path.suffix in (".yaml", ".yml"):
        raise RecipeError(f"recipe file {path} does not exist{asked_by}")
    known = names()
    by_last_part = {known_name.rsplit("/", 1)[-1]: known_name for known_name in known}
    near = difflib.get_close_matches(name, known, n=3)
    near += [by_last_part[last] for last in difflib.get_close_matches(name.rsplit("/", 1)[-1], by_last_part, n=3)]
    meant = f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else ";"
    raise RecipeError(f"unknown recipe {name!r}{asked_by}{meant} `lightning-hyper recipes` lists what ships")


def _suffixed(path: Path) -> Path:
    return path.with_name(path.name + ".yaml")  # not with_suffix, which would cut a name such as `lr0.001`


def _with_layers(path: Path, above: tuple[Path, ...]) -> list[Path]:
    """Return the files that a recipe is made of, lowest layer first, each once."""
    path = path.resolve()
    if path in above:
        chain = " -> ".join(file.stem for file in (*above[above.index(path) :], path))
        raise RecipeError(f"recipe {path}: its layers run in a circle: {chain}")
    layers = _read(path).get("layers", [])
    if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
        raise RecipeError(f"recipe {path}: `layers` must be a list of recipe names or paths, not {layers!r}")
    below = [file for layer in layers for file in _with_layers(_find(layer, beside=path), (*above, path))]
    return list(dict.fromkeys([*below, path]))


def _read(path: Path) -> dict[str, Any]:
    try:
        return _parse(path, path.stat().st_mtime_ns)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise RecipeError(f"recipe {path}: {line}{problem}") from None


@lru_cache(maxsize=1024)  # layers are shared by many recipes; the time of writing is part of the key
def _parse(path: Path, modified: int) -> dict[str, Any]:
    document = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise RecipeError(f"recipe {path}: must be a mapping of keys to values, not a {type(document).__name__}")
    if isinstance(document.get("paper"), float):
        raise RecipeError(f'recipe {path}: `paper` must be in quotes, as "2309.14970": a number would lose its zeros')
    return document


def _header(path: Path) -> list[str]:
    """Return the lines of the comment with which a recipe begins."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line)
    return lines


def _measured(header: Sequence[str]) -> str:
    """Return what follows `# measured:` and the lines indented deeper than it, as one line."""
    found: list[str] = []
    lines: Iterator[str] = iter(header)
    for line in lines:
        if match := re.match(r"#\s*measured:(.*)", line):
            found.append(match[1])
            for further in lines:
                if not re.match(r"#\s{2,}\S", further):
                    break
                found.append(further[1:])
            break
    return " ".join(" ".join(found).split()) or NOT_MEASURED


# --- merging ---------------------------------------------------------------------------------------------------------


class _Where(NamedTuple):
    """A key of a file, for messages."""

    path: Path
    key: str = ""

    def __truediv__(self, key: object) -> _Where:
        return _Where(self.path, f"{self.key}.{key}" if self.key else str(key))

    def __str__(self) -> str:
        return f"recipe {self.path}: key `{self.key}`"


def _merge(earlier: Mapping[str, Any], later: Mapping[str, Any], where: _Where) -> dict[str, Any]:
    if "class_path" in earlier and later.get("class_path", earlier["class_path"]) != earlier["class_path"]:
        earlier = {}  # the arguments of one class mean nothing to another
    merged = dict(earlier)
    for key, value in later.items():
        if isinstance(key, str) and key.endswith("+"):
            name = key[:-1]
            before = merged.get(name) or []
            if not isinstance(value, list) or not isinstance(before, list):
                fault = value if not isinstance(value, list) else before
                raise RecipeError(f"{where / key} appends a list to a list, but found {fault!r}")
            merged[name] = [*before, *_fresh(value, where / key)]
        elif isinstance(value, dict):
            before = merged.get(key)
            merged[key] = _merge(before if isinstance(before, dict) else {}, value, where / key)
        else:
            merged[key] = _fresh(value, where / key)
    return merged


def _fresh(value: Any, where: _Where) -> Any:
    """Return the value with `+` taken off the keys of mappings inside lists, sharing nothing with the cached file."""
    if isinstance(value, dict):
        return _merge({}, value, where)
    return [_fresh(item, where) for item in value] if isinstance(value, list) else value


# --- YAML ------------------------------------------------------------------------------------------------------------

# The C parser is some ten times faster, which a listing of many recipes shows.
_Loader: Any = type("_Loader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {})
_Dumper: Any = type("_Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda self, data: True})

# YAML 1.1 takes 1e-4 for a string, because it lacks a dot.
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


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


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)
_Dumper.add_representer(int, _readable_integer)
