"""The path that float32 matrix products take on CPUs.

PyTorch sends them to MKL, which runs at half speed on some processors; oneDNN, reached by allowing reduced precision,
is faster there and still computes true float32 where the processor has no narrower units. Whether both hold is
measured, never assumed.

Which one is faster is measured once for a processor, PyTorch's version and the number of threads, and kept in the
user's cache folder, so that all runs of a machine agree: a seed has one result there, bit for bit, for as long as these
stay, and a resumed run takes the path that it began with. Elsewhere, or where nothing can be kept and the two paths are
about as fast, the path may be the other one, whose products differ in their last bits; with `matmul: default` there is
no choice, but other processors still round in other ways.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from lightning_hyper.checks import RecipeError
from lightning_hyper.training.machine import hardware

EXACT = 1e-6  # largest relative error, against float64, that counts as float32
FASTER = 1.15  # least ratio of speeds for which the path is changed
PAIRS = 200  # comparisons of speed, in turn, as others may use the machine
# Rows, inputs and outputs of a layer: a critic's hidden layer, a GRU's gates over a minibatch, a small head.
SHAPES = ((256, 256, 256), (1024, 64, 192), (256, 64, 32))
PATIENCE = 60.0  # seconds to wait for another process that measures
MODES = ("auto", "default", "onednn")


@dataclass(frozen=True)
class Decision:
    """The path taken: `default` or `onednn`, and a sentence that says why."""

    name: str
    sentence: str


def choose_matmul(mode: str = "auto") -> Decision:
    """Choose the path of float32 matrix products on the CPU, for the whole process.

    Args:
        mode: `auto` takes the faster path that is exact, as measured once on this machine in a second or so;
            `default` leaves PyTorch's; `onednn` takes that path if it is exact here, as a resumed run does to compute
            the same bits.

    Raises:
        RecipeError: the mode is unknown.
    """
    if mode not in MODES:
        raise RecipeError(f"matmul is {mode!r}; choose one of {', '.join(MODES)}")
    if mode == "default":
        return Decision("default", "matmul: PyTorch's own path for float32 matrix products")
    if torch.cuda.is_available():
        # With the switch set, torch.get_float32_matmul_precision() raises, and Lightning calls it where it sees a GPU.
        return Decision("default", "matmul: PyTorch's own path for float32 matrix products, as on every GPU machine")
    ratio = _kept_ratio() if mode == "auto" else None
    _allow_onednn(True)
    error = _error(*_probe())
    found = f"relative error {error:.0e}"
    if ratio is not None:
        found = f"measured on this machine: {ratio:.2f} times as fast as PyTorch's own, {found}"
    if error < EXACT and (ratio is None or ratio > FASTER):
        return Decision("onednn", f"matmul: float32 matrix products by oneDNN ({found})")
    _allow_onednn(False)
    lost = "; the run so far used oneDNN, so it does not continue bit for bit" if mode == "onednn" else ""
    return Decision("default", f"matmul: PyTorch's own path for float32 matrix products (oneDNN: {found}{lost})")


def _kept_ratio() -> float:
    """How many times as fast oneDNN is, as the cache has it; measured, and kept, where it has nothing.

    A cache that cannot be read or written costs no more than the measurement.
    """
    place = f"{hardware()}, {torch.backends.cpu.get_cpu_capability()}"
    key = f"{place}; torch {torch.__version__}; {torch.get_num_threads()} threads"
    measured = None
    try:
        file = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_hyper" / "matmul.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock"), timeout=PATIENCE):  # a second process waits, then takes the same
            kept = _read(file)
            if key not in kept:
                kept[key] = measured = _measured_ratio()
                beside = file.with_suffix(f".{os.getpid()}.part")
                beside.write_text(json.dumps(kept, indent=1), encoding="utf-8")
                os.replace(beside, file)  # one cut short would be no JSON
            return kept[key]
    except (OSError, RuntimeError):  # no home, a full or read-only disk, no locks, another's lock
        return _measured_ratio() if measured is None else measured


def _read(file: Path) -> dict[str, float]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, float)} if isinstance(found, dict) else {}


def _allow_onednn(allow: bool) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if allow else "none"  # type: ignore[attr-defined]


def _probe() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)  # its own: the probe leaves the global generator as it was
    x, weight = torch.randn(256, 256, generator=generator), torch.randn(256, 256, generator=generator)
    return x, weight, x.double() @ weight.double().T


def _error(x: Tensor, weight: Tensor, expected: Tensor) -> float:
    """Largest relative error of a product in any of the layouts of a linear layer's forward and backward pass."""
    products = (
        (torch.nn.functional.linear(x, weight), expected),
        (x @ weight, x.double() @ weight.double()),
        (x.T @ weight, x.T.double() @ weight.double()),
        (x[:37, :23] @ weight[:23, :51], x[:37, :23].double() @ weight[:23, :51].double()),
        (torch.bmm(x.view(4, 64, 256), weight.T.expand(4, 256, 256)), expected.view(4, 64, 256)),
    )
    return max(float((found.double() - true).norm() / true.norm()) for found, true in products)


def _measured_ratio() -> float:
    """Median, over pairs in turn, of the seconds of PyTorch's own path by those of oneDNN, for all shapes together."""
    generator = torch.Generator().manual_seed(0)
    layers = [
        (torch.randn(rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator))
        for rows, inputs, outputs in SHAPES
    ]
    ratios = []
    for _ in range(PAIRS):
        usual, other = (_seconds(layers, onednn) for onednn in (False, True))
        ratios.append(usual / other)
    _allow_onednn(False)
    return statistics.median(ratios)


def _seconds(layers: list[tuple[Tensor, Tensor]], onednn: bool) -> float:
    """Seconds of a product of each layer by one of the paths."""
    _allow_onednn(onednn)
    total = 0.0
    for x, weight in layers:
        torch.nn.functional.linear(x, weight)  # the first after a change sets things up
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        total += time.perf_counter() - start
    return total
