"""Recipes: YAML files that name an experience source, an algorithm and its parts; found, layered, listed and copied.

This module needs nothing heavier than a YAML parser, so that listing recipes is immediate.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped, unused-ignore]

from lightning_hyper.checks import RecipeError
from lightning_hyper.layering import Where, dump, merge, override, problem, read

__all__ = ["RecipeError", "Row", "copy", "folder", "listing", "names", "override", "resolve", "short", "show", "stem"]

NOT_MEASURED = "not measured yet"
LONGEST = 120  # bytes of a run's name
RENAMED = "renamed.yaml"  # old names of recipes, and the layers that they are now


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
    """Return the names of the shipped recipes, sorted; parts starting with `_` are left out."""
    root = folder()
    found = (path.relative_to(root) for path in root.rglob("*.yaml") if path != root / RENAMED)
    return sorted(
        path.with_suffix("").as_posix() for path in found if not any(part.startswith("_") for part in path.parts)
    )


def resolve(names_or_paths: Sequence[str]) -> dict[str, Any]:
    """Load recipes with their layers and merge them in order; where two give a value, the later one's is kept.

    The recipes are taken for the layers of one: a layer that several of them share counts once, at its first place, so
    that it does not undo what lies between. `a+b` is short for the two names `a` and `b`. Merging follows
    `lightning_hyper.layering.merge`.

    Raises:
        RecipeError: a recipe is unknown or faulty.
    """
    if isinstance(names_or_paths, str):
        names_or_paths = [names_or_paths]
    layers = [layer for name in names_or_paths for file in _files(name) for layer in _with_layers(file, ())]
    merged: dict[str, Any] = {}
    for path in dict.fromkeys(layers):
        document = {key: value for key, value in _read(path).items() if key != "layers"}
        merged = merge(merged, document, Where(f"recipe {path}"))
    return merged


def stem(names_or_paths: Sequence[str]) -> str:
    """Return what a run of these recipes is called after: their last parts, joined."""
    parts = [part for name in names_or_paths for part in _composed(name)]
    lasts = (re.sub(r"\.ya?ml$", "", part.rsplit("/", 1)[-1]).lstrip("_") for part in parts)
    return short("-".join(lasts))


def short(name: str, longest: int = LONGEST) -> str:
    """Return a name that a file system takes: where it is too long, its beginning and a digest of the whole."""
    if len(name.encode()) <= longest:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name.encode()[: longest - 9].decode(errors='ignore')}-{digest}"


def listing(words: Sequence[str] = ()) -> tuple[list[Row], dict[str, str]]:
    """Return a row for each shipped recipe that is whole, and what each layer is, by name.

    Layers are trained together with others, `fit -c LAYER -c LAYER`.

    Args:
        words: those alone are returned in whose name, paper, method, environment or description each of them occurs,
            capitals or not; a layer has the papers of the recipes in its folder.

    Raises:
        RecipeError: none has the words, or one cannot be read.
    """
    rows, layers, texts = [], {}, []
    resolved = {name: resolve([name]) for name in names()}
    papers: dict[str, set[str]] = {}
    for name, recipe in resolved.items():
        papers.setdefault(name.split("/")[0], set()).add(str(recipe.get("paper", "")))
    for name, recipe in resolved.items():
        header = _header([name])
        paper, method, environment = (str(recipe.get(key, "")) for key in ("paper", "method", "environment"))
        about = _about(name, header)
        texts.append(" ".join((name, *papers[name.split("/")[0]], method, environment, about)).lower())
        if not all(word.lower() in texts[-1] for word in words):
            continue
        if _is_whole(recipe):
            rows.append(Row(name, paper, method, environment, _measured(header) or NOT_MEASURED))
        else:
            layers[name] = about
    if words and not rows and not layers:
        raise RecipeError(_nothing_has(words, texts))
    return rows, layers


def _nothing_has(words: Sequence[str], texts: Sequence[str]) -> str:
    """The sentence for words that no recipe has, by the texts in which they were looked for."""
    unknown = next((word for word in words if not any(word.lower() in text for text in texts)), None)
    if unknown is None:
        return f"no recipe has all of {', '.join(map(repr, words))}; each alone is in some"
    known = {part for text in texts for word in text.split() for part in (word.strip(".,:;()"), word.rsplit("/")[-1])}
    near = difflib.get_close_matches(unknown.lower(), sorted({*known, "show", "copy"}), n=1)
    meant = f"did you mean {near[0]!r}?" if near else "`lightning-hyper recipes` lists what ships"
    return f"no recipe has {unknown!r} in its name, paper, method, environment or description; {meant}"


def _is_whole(recipe: dict[str, Any]) -> bool:
    """Whether a recipe names model and data, and the class of each part that it gives arguments to."""
    return bool(recipe.get("model") and recipe.get("data")) and not _lacks_class(recipe)


def _lacks_class(tree: Any) -> bool:
    if isinstance(tree, list):
        return any(_lacks_class(item) for item in tree)
    if not isinstance(tree, dict):
        return False
    return ("init_args" in tree and "class_path" not in tree) or any(_lacks_class(branch) for branch in tree.values())


def show(name: str) -> str:
    """Return the header comment of a recipe and its merged YAML, layers included; raises RecipeError."""
    return "".join(f"{line}\n" for line in _header([name])) + dump(resolve([name]))


def copy(name: str, destination: str | Path | None = None) -> Path:
    """Write a recipe, whole, to a file or into a folder and return the path: by default `<last part>.yaml` here.

    What was measured with the shipped recipe is left out, as the copy is there to be changed.

    Raises RecipeError if the recipe is unknown, or if the file exists or cannot be written.
    """
    file_name = f"{stem([name])}.yaml"
    target = Path(destination) if destination is not None else Path(file_name)
    if target.is_dir():
        target /= file_name
    about = [*_without(_header([name]), "measured", "run"), f"# run: lightning-hyper fit -c {target}"]
    text = "".join(f"{line}\n" for line in about) + dump(resolve([name]))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"{target} exists and is not overwritten; name another destination") from None
    except OSError as error:
        raise RecipeError(f"cannot write the recipe to {target}: {error.strerror}") from None
    return target


def _files(name: str, beside: Path | None = None) -> list[Path]:
    """Return the files that a name stands for: one, or several where it is composed, or the old name of a composition.

    Args:
        name: a path (relative to the file `beside`, if given) or a shipped name.
        beside: file of the recipe that asks for it as a layer.
    """
    found = _file(name, beside)
    if found is not None:
        return [found]
    if "+" in name:
        return [file for part in name.split("+") for file in _files(part, beside)]
    renamed = _renamed()
    if name in renamed:
        _say_renamed(name, tuple(renamed[name]))
        return [file for part in renamed[name] for file in _files(part)]
    asked_by = f" (a layer of {beside})" if beside else ""
    if name.endswith((".yaml", ".yml")):
        raise RecipeError(f"recipe file {name} does not exist{asked_by}")
    known = names()
    by_last_part = {known_name.rsplit("/", 1)[-1]: known_name for known_name in known}
    near = difflib.get_close_matches(name, known, n=3)
    near += [by_last_part[last] for last in difflib.get_close_matches(name.rsplit("/", 1)[-1], by_last_part, n=3)]
    meant = f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else ";"
    raise RecipeError(f"unknown recipe {name!r}{asked_by}{meant} `lightning-hyper recipes` lists what ships")


def _file(name: str, beside: Path | None = None) -> Path | None:
    path, shipped = (beside.parent if beside else Path()) / name, folder() / name
    candidates = (path, _suffixed(path) if beside else path, shipped, _suffixed(shipped))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _suffixed(path: Path) -> Path:
    return path.with_name(path.name + ".yaml")  # not with_suffix, which would cut a name such as `lr0.001`


def _composed(name: str) -> list[str]:
    return [name] if _file(name) is not None else name.split("+")


def _renamed() -> dict[str, list[str]]:
    path = folder() / RENAMED
    return _read(path) if path.is_file() else {}


@lru_cache(maxsize=1024)  # each is said once
def _say_renamed(name: str, layers: tuple[str, ...]) -> None:
    print(f"recipe {name} is now called: {' '.join(f'-c {layer}' for layer in layers)}", file=sys.stderr)


def _with_layers(path: Path, above: tuple[Path, ...]) -> list[Path]:
    """Return the files that a recipe is made of, lowest layer first, each once."""
    path = path.resolve()
    if path in above:
        chain = " -> ".join(file.stem for file in (*above[above.index(path) :], path))
        raise RecipeError(f"recipe {path}: its layers run in a circle: {chain}")
    layers = _read(path).get("layers", [])
    if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
        raise RecipeError(f"recipe {path}: `layers` must be a list of recipe names or paths, not {layers!r}")
    files = [file for layer in layers for file in _files(layer, beside=path)]
    below = [layer for file in files for layer in _with_layers(file, (*above, path))]
    return list(dict.fromkeys([*below, path]))


def _read(path: Path) -> dict[str, Any]:
    try:
        return _parse(path, path.stat().st_mtime_ns)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path}: {problem(error)}") from None


@lru_cache(maxsize=1024)  # layers are shared by many recipes; the time of writing is part of the key
def _parse(path: Path, modified: int) -> dict[str, Any]:
    document = read(path.read_text(encoding="utf-8"))
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise RecipeError(f"recipe {path}: must be a mapping of keys to values, not a {type(document).__name__}")
    if isinstance(document.get("paper"), float):
        raise RecipeError(f'recipe {path}: `paper` must be in quotes, as "2309.14970": a number would lose its zeros')
    return document


def _header(names_or_paths: Sequence[str]) -> list[str]:
    """Return the lines of the comments with which recipes begin."""
    lines = []
    for path in (file for name in names_or_paths for file in _files(name)):
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            lines.append(line)
    return lines


def _about(name: str, header: Sequence[str]) -> str:
    """Return what the header says before its first `# <word>:`, as one line, without the name."""
    lines = itertools.takewhile(lambda line: not re.match(r"#\s*\w+:", line), header)
    return " ".join(" ".join(line[1:] for line in lines).split()).removeprefix(name).strip()


def _measured(header: Sequence[str]) -> str:
    """Return what follows `# measured:` and the lines indented deeper than it, as one line; '' without such a line."""
    return " ".join(" ".join(line for key, line in _keyed(header) if key == "measured").split())


def _without(header: Sequence[str], *keys: str) -> list[str]:
    """Return the header's lines but for those of some keys."""
    return [line for line, (key, _) in zip(header, _keyed(header), strict=True) if key not in keys]


def _keyed(header: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Give each line its key, that of `# <key>:` or of the line above that it is indented below, and its text."""
    key = ""
    for line in header:
        if match := re.match(r"#\s?(\w+):(.*)", line):
            key, text = match[1], match[2]
        else:
            key, text = key if re.match(r"#\s{2,}\S", line) else "", line[1:]
        yield key, text
