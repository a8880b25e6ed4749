import itertools
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lightning_hyper.training import matmul
from lightning_hyper.training.matmul import choose_matmul

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="GPU machines keep the usual path")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The file of decisions, in a cache folder of the test's own; the path of products is put back."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path / "lightning_hyper" / "matmul.json"
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
    monkeypatch.setattr(matmul, "_measured_ratio", lambda: 2.0)
    assert choose_matmul("auto").name == "default"
    assert switch() == "none"
    resumed = choose_matmul("onednn")
    assert resumed.name == "default"
    assert switch() == "none"
    assert "not continue bit for bit" in resumed.sentence


@no_gpu
def test_the_faster_path_is_taken_only_if_clearly_faster(monkeypatch, cache):
    monkeypatch.setattr(matmul, "_error", lambda *_: 1e-7)
    monkeypatch.setattr(matmul, "_measured_ratio", lambda: 1.1)
    assert (choose_matmul("auto").name, switch()) == ("default", "none")
    assert (choose_matmul("onednn").name, switch()) == ("onednn", "bf16")  # a resumed run keeps its bits
    cache.unlink()
    monkeypatch.setattr(matmul, "_measured_ratio", lambda: 2.0)
    decision = choose_matmul("auto")
    assert (decision.name, switch()) == ("onednn", "bf16")
    assert "2.00 times" in decision.sentence


def test_default_changes_nothing():
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    assert choose_matmul("default").name == "default"
    assert switch() == "bf16"


def test_a_gpu_machine_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(matmul, "_measured_ratio", lambda: 2.0)
    assert choose_matmul("auto").name == "default"
    assert torch.get_float32_matmul_precision() == "highest"  # raises if the switch is set, and Lightning calls it


def test_the_probe_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    choose_matmul("auto")
    assert torch.equal(before, torch.get_rng_state())


@no_gpu
def test_what_was_measured_once_is_kept_for_the_same_environment(monkeypatch, cache):
    measured = iter([2.0, 1.0, 3.0])
    monkeypatch.setattr(matmul, "_measured_ratio", lambda: next(measured))
    assert [choose_matmul("auto").name for _ in range(3)] == ["onednn"] * 3
    monkeypatch.setattr(torch, "__version__", "99")
    assert [choose_matmul("auto").name for _ in range(3)] == ["default"] * 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert choose_matmul("auto").name == "onednn"
    assert sorted(json.loads(cache.read_text()).values()) == [1.0, 2.0, 3.0]
    assert {file.suffix for file in cache.parent.iterdir()} <= {".json", ".lock"}


@no_gpu
@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": "b"}', "\xff"])
def test_a_broken_cache_is_made_anew(content, monkeypatch, cache):
    monkeypatch.setattr(matmul, "_measured_ratio", lambda: 2.0)
    cache.parent.mkdir()
    cache.write_text(content, encoding="latin-1")
    assert choose_matmul("auto").name == "onednn"
    assert list(json.loads(cache.read_text()).values()) == [2.0]


@no_gpu
def test_a_cache_that_cannot_be_written_costs_no_more_than_the_measurement(monkeypatch, cache, tmp_path):
    measured = []
    monkeypatch.setattr(matmul, "_measured_ratio", lambda: measured.append(1) or 2.0)
    cache.parent.write_text("a file where the folder would be")
    assert choose_matmul("auto").name == "onednn"
    cache.parent.unlink()
    with monkeypatch.context() as full:
        full.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        assert choose_matmul("auto").name == "onednn"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no home is known
    assert choose_matmul("auto").name == "onednn"
    assert len(measured) == 3


@no_gpu
def test_runs_that_begin_together_agree(cache, monkeypatch):
    measured, begin = itertools.count(1.0), threading.Barrier(4)
    monkeypatch.setattr(matmul, "_measured_ratio", lambda: time.sleep(0.1) or next(measured))
    with ThreadPoolExecutor(4) as pool:  # a lock of the file counts between threads as between processes
        runs = [pool.submit(lambda: (begin.wait(), matmul._kept_ratio())[1]) for _ in range(4)]
        found = {run.result() for run in runs}
    assert found == {1.0}


def test_a_disturbed_pair_does_not_decide(monkeypatch):
    seconds = iter([100.0, 1.0] + [1.0, 100.0] * 2 + [2.0, 1.0] * 197)
    monkeypatch.setattr(matmul, "_seconds", lambda layers, onednn: next(seconds))
    assert matmul._measured_ratio() == 2.0
    assert next(seconds, None) is None


def test_an_unknown_mode_names_the_key():
    with pytest.raises(ValueError, match=r"matmul.*'fast'.*auto"):
        choose_matmul("fast")
