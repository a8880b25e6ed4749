"""A sample of the matrix: a cell trains, or is refused in one sentence that names a key; none is a traceback."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("matrix", Path(__file__).with_name("matrix.py"))
matrix = importlib.util.module_from_spec(spec)
spec.loader.exec_module(matrix)

CELLS = list(matrix.cells())
TRAINED = [
    ("PPO", "CartPole", "recurrent", "Hyper"),
    ("PPO", "MiniGrid", "one-hot, recurrent", "Concat"),
    ("PPO", "trials of GridNavi", "task", "FiLM"),
    ("RetrievalPPO", "Pendulum", "recurrent", "Concat"),
    ("RetrievalPPO", "MiniGrid", "text", "Hyper"),
    ("PPO", "trials of GridNavi", "variational", "Hyper"),
    ("SAC", "trials of Pendulum", "variational", "Concat"),
    ("TD3", "HalfCheetah", "recurrent", "Hyper"),
    ("SAC", "trials of Pendulum", "one-hot, recurrent", "Concat"),
]


@pytest.mark.parametrize("cell", TRAINED, ids="-".join)
def test_what_has_a_meaning_trains(cell):
    assert matrix.outcome(*cell) == ""


@pytest.mark.parametrize("cell", CELLS[::53], ids="-".join)
def test_a_cell_trains_or_says_why_not(cell):
    refusal = matrix.outcome(*cell)
    if refusal:
        assert refusal.startswith(("model", "data")) or "model." in refusal
        assert refusal.count(". ") == 0
        assert len(refusal) < 200
