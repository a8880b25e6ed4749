"""Shared by all tests: one thread, fixed generators, shapes checked, GPU checks that skip without a GPU."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
from pathlib import Path
from typing import get_type_hints

import jaxtyping
import pytest
import torch

_jaxtyped = jaxtyping.jaxtyped


def _where_shapes_are(*, typechecker):
    """`jaxtyped` for functions with shapes in their annotations alone, and while they run, not while they are compiled.

    Other types are the business of mypy, and of `checked` in constructors: to check them too would make the tests take
    half as long again.
    """

    def decorate(fn):
        if isinstance(fn, type) or not _has_shapes(fn):
            return fn
        checking = _jaxtyped(fn, typechecker=typechecker)

        @functools.wraps(fn)
        def run(*args, **kwargs):
            return fn(*args, **kwargs) if torch.compiler.is_compiling() else checking(*args, **kwargs)

        return run

    return decorate


def _has_shapes(fn):
    try:
        return "jaxtyping." in repr(get_type_hints(fn))
    except NameError:  # of a class that is being made
        return True


# Before anything imports the package: what was imported before is not checked.
jaxtyping.jaxtyped = _where_shapes_are
jaxtyping.install_import_hook(["lightning_hyper.nn", "lightning_hyper.objectives"], "beartype.beartype")

TINY = Path(__file__).parent / "tiny.yaml"


@pytest.fixture(autouse=True)
def _fixed_generator():
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--campaign", type=int, default=1, help="how long searches for faults go on: times the usual (1)")


@pytest.fixture
def campaign(request):
    """How many times as long as usual a search for faults goes on."""
    return request.config.getoption("--campaign")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Run the tiny recipe in a folder of its own: `tiny("fit", "--seed", "3")` gives the exit code."""
    from lightning_hyper.experiment import main

    monkeypatch.chdir(tmp_path)

    def run(verb, *arguments, recipe=TINY):
        return main([verb, *(["-c", str(recipe)] if recipe else []), *arguments])

    return run
