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


@pytest.fixture
def tiny_agent():
    """A small agent of each method on GridNavi, by name."""
    from functools import partial

    from lightning_hyper.modules import MetaAgent, RecurrentContext, Spaces
    from lightning_hyper.nn import GRU, Concat, ContextOnly, FiLM, Hyper

    def make(method="Hyper", spaces=Spaces(observation=2, task=2, actions=5, discrete=True)):  # noqa: B008
        network = {"Hyper": Hyper, "Concat": Concat, "ContextOnly": ContextOnly, "FiLM": FiLM}[method]
        context = partial(RecurrentContext, encoder=partial(GRU, hidden=8), code=None)
        return MetaAgent(
            spaces, context=context, actor=partial(network, hidden=[6]), critic=partial(network, hidden=[6])
        )

    return make
