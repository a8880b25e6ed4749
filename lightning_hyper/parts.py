"""The parts that recipes name: importing this module gives the package's classes their short names."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn as torch_nn

from lightning_hyper.algorithms import Algorithm
from lightning_hyper.analysis import attention, gradient_similarity, trial_picture, video
from lightning_hyper.checks import RecipeError
from lightning_hyper.constructors import check, subclasses
from lightning_hyper.foreign import ROOMS, foreign, limited
from lightning_hyper.training.checkpoint import Checkpoints

CALLBACKS = (attention, gradient_similarity, trial_picture, video)
GROUPS: dict[str, type[Any]] = {"trainer": Trainer, "checkpoint": Checkpoints}  # arguments of a class that is not named
PARTS = ("model", "data", "trainer", "checkpoint")  # the keys of a recipe below which classes are named
BASES: dict[str, type[Any]] = {"model": Algorithm, "data": LightningDataModule}  # what is taken from a checkpoint


def _short_names() -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for room in (*ROOMS, *CALLBACKS):
        for name, value in vars(room).items():
            if inspect.isclass(value) and value.__module__.startswith("lightning_hyper.") and not name.startswith("_"):
                found.setdefault(name, set()).add(f"{value.__module__}.{value.__qualname__}")
    return {name: paths.pop() for name, paths in found.items() if len(paths) == 1}


NAMES = _short_names()


def with_paths(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe in which a short name that is ours, and some other package's too, means ours.

    Other short names are left to the parser, which finds them among the subclasses of what an argument takes.
    """
    alike = {cls.__name__ for cls in subclasses(torch_nn.Module) if not cls.__module__.startswith("lightning_hyper.")}
    shared = {name: path for name, path in NAMES.items() if name in alike}
    return {key: _replaced(value, shared) if key in PARTS else value for key, value in recipe.items()}


def _replaced(tree: Any, names: Mapping[str, str]) -> Any:
    if isinstance(tree, Mapping):
        return {key: _replaced(value, names) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_replaced(item, names) for item in tree]
    return names.get(tree, tree) if isinstance(tree, str) else tree


def refuse_foreign(recipe: Mapping[str, Any], key: str, trust: Sequence[str] = ()) -> None:
    """Check that the model and data of a recipe that comes with a checkpoint name only parts of this package.

    Nothing that they name besides is imported, and no file is read. What other keys of the recipe say is not looked at.

    Args:
        recipe: of a checkpoint.
        key: what names the checkpoint, for messages.
        trust: modules, packages or classes that may be named besides.

    Raises:
        RecipeError: they name something else, or do not parse.
    """
    _parsed({part: recipe[part] for part in BASES if part in recipe}, key, trust)


def instantiate_model(config: Mapping[str, Any], *, trust: Sequence[str] = ()) -> Algorithm:
    """Make the algorithm of a checkpoint's recipe.

    Args:
        config: the recipe's `model`.
        trust: modules, packages or classes outside of this package that it may name.

    Raises:
        RecipeError: it cannot be made, or names something that is not trusted.
    """
    parser, parsed = _parsed({"model": config}, "model", trust)
    if "init_args.memory.init_args.prefill" in parsed.model:
        parsed.model.init_args.memory.init_args.prefill = None  # another file, of which only training knows
    with limited(trust):
        return cast(Algorithm, instantiate(parser, parsed).model)


def _parsed(recipe: Mapping[str, Any], key: str, trust: Sequence[str]) -> tuple[ArgumentParser, Namespace]:
    parser = ArgumentParser(exit_on_error=False)
    for part in recipe:
        parser.add_subclass_arguments(BASES[part], part, required=True, fail_untyped=False)
    try:
        with limited(trust):
            config = parse(parser, recipe)
    except Exception as error:  # a recipe that no run wrote may make anything of its parser
        refused = re.search(r"Importing '([\w.]+)' is not allowed", str(error.__cause__))
        if refused is None:
            said = str(error) if isinstance(error, RecipeError) else type(error).__name__
            raise RecipeError(f"{key}: the checkpoint's recipe cannot be used: {said}") from error
        name: str | None = refused[1]
    else:
        name = foreign(config, trust)
    if name is not None:
        raise RecipeError(
            f"{key}: the checkpoint's recipe names {name[:80]}, which is no part of this package; where you trust it, "
            "say so with `load(..., trust=[...])` or `--trust`"
        )
    return parser, config


def parse(parser: ArgumentParser, recipe: Mapping[str, Any]) -> Namespace:
    """Parse a recipe, or a part of one.

    Raises:
        RecipeError: a key, class or value that a part does not take.
    """
    check(recipe, NAMES, GROUPS)
    try:
        return cast(Namespace, parser.parse_object(with_paths(recipe)))
    except ArgumentError as error:
        raise RecipeError(sentence(str(error))) from error


def instantiate(parser: ArgumentParser, config: Namespace) -> Namespace:
    """Make the objects of a parsed recipe; what a constructor raises comes as it was raised."""
    try:
        return cast(Namespace, parser.instantiate(config))
    except ValueError as error:
        # Where an argument may be of several types, jsonargparse wraps what the constructor said.
        fault: BaseException = error
        while str(fault).startswith("Does not validate") and fault.__cause__ is not None:
            fault = fault.__cause__
    raise fault


NOISE = (
    *("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>", "Expected a path"),
    *("Subclass types expect one of", "a class path (str)", "a dict with"),
)


def sentence(message: str) -> str:
    """Return what jsonargparse has to say in one sentence that names the key, without its tree of alternatives.

    Args:
        message: text of its error, in which what lies deeper in the recipe is indented deeper.
    """
    above: list[tuple[int, str, str]] = []  # indentation and key, or class, of the lines that lead to this one
    found: list[tuple[int, str]] = []
    for line in message.splitlines():
        text = line.lstrip(" -")
        indent = len(line) - len(text)
        if not text or text.startswith(NOISE):
            continue
        above = [entry for entry in above if entry[0] < indent]
        if key := re.search(r"Parser key \"(.+)\":\s*$", text):
            above.append((indent, key[1], ""))
        elif path := re.match(r"Problem with given class_path '(.+)':\s*$", text):
            above.append((indent, "", path[1].rpartition(".")[2]))
        else:
            key_here = ".".join(key for _, key, _ in above if key).replace(".init_args", "")
            class_here = next((cls for _, _, cls in reversed(above) if cls), "a recipe")
            found.append((len(above), _plainly(text, key_here, class_here)))
    deepest = dict.fromkeys(said for depth, said in found if depth == max(depth for depth, _ in found))
    # Of a class that is unknown, or of an argument that a class does not take, the alternatives say nothing.
    plain = [said for said in deepest if "there is no class" in said or "no such argument" in said]
    return "; or ".join(plain or deepest) or " ".join(message.split())


def _plainly(text: str, key: str, cls: str) -> str:
    """Return one of jsonargparse's complaints, of an argument of a class, in our words."""
    text = re.sub(r"\.? Got value: (Namespace\(|\{).*$", "", text)
    if refused := re.match(r"(?:Group '(.+)' does not accept option|Option) '(.+?)'(?: is not accepted)?$", text):
        key = ".".join(filter(None, (key, refused[1], refused[2])))
        return f"{key}: {refused[1] or cls} takes no such argument"
    if unknown := re.match(r"(?:(\S+): )?Expected a dot import path string: (.+)", text):
        near = difflib.get_close_matches(unknown[2], NAMES, n=1)
        return f"{key or unknown[1]}: there is no class {unknown[2]!r}" + (f"; did you mean {near[0]}?" if near else "")
    if missing := re.search(r"the following arguments are required: (.+)", text):
        return f"{key}: {cls} needs {missing[1]}" if key else f"{cls} needs {missing[1]}"
    if other := re.match(r"Expected an? (.+)\. Got value: (.*)", text):
        wanted = re.sub(
            r"<class '(.+)'>|typing\.Literal\[(.+)\]", lambda found: found[1] or f"one of {found[2]}", other[1]
        )
        return f"{key} is {other[2]!r}; it must be {wanted}"
    if base := re.match(r"Not a valid subclass of (\w+)", text):
        return f"{key} must name a class, a kind of {base[1]}"
    if names := re.match(r"Expected a typing\.Literal\[(.+)\]", text):
        return f"{key} must be one of {names[1]}"
    return f"{key}: {text}" if key else text
