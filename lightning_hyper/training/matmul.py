"""The path that float32 matrix products take on CPUs.

PyTorch sends them to MKL, which runs at half speed on some processors; oneDNN, reached by allowing reduced precision,
is faster there and still computes true float32 where the processor has no narrower units. Whether both hold is
measured, never assumed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hyper.checks import RecipeError

EXACT = 1e-6  # largest relative error, against float64, that counts as float32
FASTER = 1.15  # least ratio of speeds for which the path is changed
PATIENCE = 0.04  # seconds that the comparison of speeds may take, on a machine that others use too
MODES = ("auto", "default", "onednn")


@dataclass(frozen=True)
class Decision:
    """The path taken: `default` or `onednn`, and a sentence that says why."""

    name: str
    sentence: str


def choose_matmul(mode: str = "auto") -> Decision:
    """Choose the path of float32 matrix products on the CPU, for the whole process.

    Args:
        mode: `auto` probes (some 50 ms) and takes the faster path that is exact; `default` leaves PyTorch's;
            `onednn` takes that path if it is exact here, as a resumed run does to compute the same bits.

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
    x, weight, expected = _probe()
    usual, other = _seconds(x, weight)
    _allow_onednn(True)
    error = _error(x, weight, expected)
    found = f"{usual / other:.2f} times as fast as PyTorch's own, relative error {error:.0e}"
    if error < EXACT and (usual / other > FASTER or mode == "onednn"):
        return Decision("onednn", f"matmul: float32 matrix products by oneDNN ({found})")
    _allow_onednn(False)
    lost = "; the run so far used oneDNN, so it does not continue bit for bit" if mode == "onednn" else ""
    return Decision("default", f"matmul: PyTorch's own path for float32 matrix products (oneDNN is {found}{lost})")


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


def _seconds(x: Tensor, weight: Tensor) -> tuple[float, float]:
    """Seconds of one product by PyTorch's own path and by oneDNN, in turn; the best, as others may use the machine."""
    best = [float("inf"), float("inf")]
    end = time.perf_counter() + PATIENCE
    for _ in range(60):
        for path in (0, 1):
            _allow_onednn(bool(path))
            torch.nn.functional.linear(x, weight)  # the first after a change sets things up
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            best[path] = min(best[path], time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return best[0], best[1]
