"""Shared by all tests: one thread, fixed generators, GPU checks that skip without a GPU."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch

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
