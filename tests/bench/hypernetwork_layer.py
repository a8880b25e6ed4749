"""One generated layer, forward and backward: each order of its computation over the naive forms, at the papers' sizes.

Prints milliseconds (median of 15, after 3 to warm up); on a GPU too where there is one.
"""

import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.func import functional_call, vmap

from lightning_hyper.nn import GeneratedLinear
from lightning_hyper.training.matmul import choose_matmul

SIZES = {  # z, in, out, rows
    "recurrent paper, layer 1": (25, 25, 256, 240),
    "recurrent paper, layer 2": (25, 256, 128, 240),
    "recurrent paper, actor head": (25, 128, 5, 240),
    "recurrent paper, critic head": (25, 128, 1, 240),
    "fast preset, layer 1": (64, 3, 32, 3840),
    "fast preset, actor head": (64, 32, 5, 3840),
    "building blocks, SA layer 1": (1024, 6, 256, 100),
    "building blocks, SA head": (1024, 256, 1, 100),
}


def einsum(layer, z, x):
    weight, bias, _ = layer.generate(z)
    return torch.einsum("boi,bi->bo", weight, x) + bias


def per_sample(layer, z, x):
    plain = torch.nn.Linear(layer.in_features, layer.out_features, device=z.device)
    weight, bias, _ = layer.generate(z)
    return vmap(lambda w, b, row: functional_call(plain, {"weight": w, "bias": b}, (row,)))(weight, bias, x)


def milliseconds(run, device):
    times = []
    for _ in range(18):
        start = time.perf_counter()
        run().square().sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[3:])


def main(device):
    print(f"\n{device}: ms forward and backward; * is what `auto` takes, the ratio is einsum over it")
    names = ("materialise", "outer", "inner")
    print(f"{'':30}" + "".join(f"{n:>13}" for n in (*names, "einsum", "vmap")) + f"{'ratio':>8}")
    for name, (z_features, inputs, outputs, rows) in SIZES.items():
        z = torch.randn(rows, z_features, device=device, requires_grad=True)
        x = torch.randn(rows, inputs, device=device, requires_grad=True)
        auto = GeneratedLinear(z_features, inputs, outputs).contraction
        found = {}
        for order in names:
            layer = GeneratedLinear(z_features, inputs, outputs, contraction=order).to(device)
            found[order] = milliseconds(lambda layer=layer, z=z, x=x: layer(z, x), device)
        found["einsum"] = milliseconds(lambda layer=layer, z=z, x=x: einsum(layer, z, x), device)
        found["vmap"] = milliseconds(lambda layer=layer, z=z, x=x: per_sample(layer, z, x), device)
        cells = "".join(f"{ms:12.2f}{'*' if order == auto else ' '}" for order, ms in found.items())
        print(f"{name:30}{cells}{found['einsum'] / found[auto]:8.1f}", flush=True)


if __name__ == "__main__":
    print(choose_matmul("auto").sentence)
    for kind in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        main(kind)
