import time

import pytest
import torch

from lightning_hyper.training import matmul
from lightning_hyper.training.matmul import choose_matmul


@pytest.fixture(autouse=True)
def _path_restored():
    yield
    torch.backends.mkldnn.matmul.fp32_precision = "none"


def switch():
    return torch.backends.mkldnn.matmul.fp32_precision


def products_are_float32():
    layer, x = torch.nn.Linear(300, 200), torch.randn(100, 300, requires_grad=True)
    layer(x).sum().backward()
    true = x.double() @ layer.weight.double().T + layer.bias.double()
    gradient = layer.weight.double().sum(0).expand(100, 300)
    errors = [(a.double() - b).norm() / b.norm() for a, b in ((layer(x), true), (x.grad, gradient))]
    return max(errors) < 1e-6


def test_auto_keeps_products_true_float32():
    decision = choose_matmul("auto")
    assert (decision.name == "onednn") == (switch() == "bf16")
    assert products_are_float32()


def test_a_path_that_loses_precision_is_refused(monkeypatch):
    honest = torch.nn.functional.linear

    def rounded(x, weight):  # what a processor with bfloat16 units does once it may
        return honest(x.bfloat16(), weight.bfloat16()).float() if switch() == "bf16" else honest(x, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", rounded)
    monkeypatch.setattr(matmul, "_seconds", lambda x, weight: (2.0, 1.0))
    assert choose_matmul("auto").name == "default"
    assert switch() == "none"
    resumed = choose_matmul("onednn")
    assert resumed.name == "default"
    assert switch() == "none"
    assert "not continue bit for bit" in resumed.sentence


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPU machines keep the usual path")
def test_the_faster_path_is_taken_only_if_clearly_faster(monkeypatch):
    monkeypatch.setattr(matmul, "_error", lambda *_: 1e-7)
    monkeypatch.setattr(matmul, "_seconds", lambda x, weight: (1.1, 1.0))
    assert (choose_matmul("auto").name, switch()) == ("default", "none")
    assert (choose_matmul("onednn").name, switch()) == ("onednn", "bf16")  # a resumed run keeps its bits
    monkeypatch.setattr(matmul, "_seconds", lambda x, weight: (2.0, 1.0))
    decision = choose_matmul("auto")
    assert (decision.name, switch()) == ("onednn", "bf16")
    assert "2.00 times" in decision.sentence


def test_default_changes_nothing():
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    assert choose_matmul("default").name == "default"
    assert switch() == "bf16"


def test_a_gpu_machine_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(matmul, "_seconds", lambda x, weight: (2.0, 1.0))
    assert choose_matmul("auto").name == "default"
    assert torch.get_float32_matmul_precision() == "highest"  # raises if the switch is set, and Lightning calls it


def test_the_probe_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    choose_matmul("auto")
    assert torch.equal(before, torch.get_rng_state())


def test_the_comparison_stops_in_time(monkeypatch):
    monkeypatch.setattr(matmul, "PATIENCE", 0.0)
    calls = []
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w: (calls.append(1), time.sleep(0.001)))
    matmul._seconds(torch.zeros(1), torch.zeros(1))
    assert len(calls) == 4


def test_an_unknown_mode_names_the_key():
    with pytest.raises(ValueError, match=r"matmul.*'fast'.*auto"):
        choose_matmul("fast")
