"""The kernels' parts of `gpu_day`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_sizes import Sizes
from torch.nn.functional import linear

from eqat_kernels import dequantize, quant_linear

SEVEN_B = ((4096, 4096), (11008, 4096), (4096, 11008))
SEVENTY_B = ((8192, 8192), (28672, 8192), (8192, 28672))
BLOCK_OF_7B = ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),)

_TESTS_S = 150
"""Seconds for the tests: they took 105 beside a training, and the whole day has 600."""


def machine(sizes: Sizes) -> dict[str, Any]:
    """What the device can do at most: a copy, a product, both ways to the host."""
    big = torch.empty(sizes.of(1 << 30, 1 << 20), dtype=torch.uint8, device=sizes.device)
    other, square = torch.empty_like(big), sizes.random(sizes.of(8192, 64), sizes.of(8192, 64))
    found = {
        "copy TB/s": 2 * big.numel() / sizes.device_us(lambda: other.copy_(big)) / 1e6,
        "bfloat16 TFLOP/s": 2 * square.shape[0] ** 3 / sizes.device_us(lambda: square @ square) / 1e6,
    }
    for kind in ("pageable", "pinned"):
        host = torch.zeros(1 << 26, dtype=torch.uint8)
        host = host.pin_memory() if kind == "pinned" and not sizes.dry else host
        there = torch.empty_like(host, device=sizes.device)
        there.copy_(host)
        found[f"to the device, {kind}, GB/s"] = host.numel() / sizes.wall_s(lambda h=host, t=there: t.copy_(h)) / 1e9  # type: ignore[misc]
    return found


def tests(sizes: Sizes) -> dict[str, Any]:
    """The tests that need a GPU, as `make test-gpu` runs them."""
    if sizes.dry:
        return {}
    words = [sys.executable, "-m", "pytest", "-q", "-n", "15", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    loose = [
        "--continue-on-collection-errors",
        "-o",
        "addopts=--import-mode=importlib",
        "-o",
        "minversion=1",
        "-o",
        "filterwarnings=default",
    ]
    try:
        done = subprocess.run([*words, *loose], capture_output=True, text=True, timeout=_TESTS_S, check=False)
    except subprocess.TimeoutExpired as late:
        return {"result": f"{_TESTS_S} s were not enough", "end": str(late.stdout)[-3000:]}
    Path(os.environ.get("OUT", "."), "gpu_day_tests.txt").write_text(done.stdout[-300_000:])
    return {"result": done.stdout.strip().splitlines()[-1:]}


def decode(sizes: Sizes) -> dict[str, Any]:
    """One row: microseconds of the dense product, and of the packed one by the sizes of its kernel; Python's share."""
    from eqat_kernels.quant_linear import few_rows

    found: dict[str, Any] = {}
    for outputs, inputs in sizes.layers(*SEVEN_B, *SEVENTY_B[1:]):
        x, dense = sizes.random(1, inputs), sizes.random(outputs, inputs)
        row = found[f"{outputs}x{inputs}"] = {"dense": sizes.device_us(lambda x=x, w=dense: linear(x, w))}  # type: ignore[misc]
        for bits in (2, 3, 4):
            packed = sizes.packed(outputs, inputs, bits)
            exact = linear(x.double(), dequantize(*packed, torch.float64, impl="reference"))
            for of_program, units in product((4, 8), (64, 128)):
                with mock.patch.multiple(few_rows, OUTPUTS=of_program, UNITS=units), torch.no_grad():
                    call = lambda x=x, w=packed: few_rows.forward(x, *w, None)  # noqa: E731
                    row[f"{bits} bits, {of_program} outputs, {units} units"] = sizes.device_us(call)
            row[f"{bits} bits, relative error"] = float((call().double() - exact).norm() / exact.norm())
    x, packed = sizes.random(1, sizes.of(4096, 64)), sizes.packed(sizes.of(4096, 16), sizes.of(4096, 64), 2)
    with torch.no_grad():
        found["host us of a call"] = _host_us(sizes, lambda: quant_linear(x, *packed, impl=sizes.impl))
    return found


def _host_us(sizes: Sizes, call: Any) -> float:
    call()
    sizes.synchronize()
    begun = time.perf_counter()
    for _ in range(50):
        call()
    spent = time.perf_counter() - begun
    sizes.synchronize()
    return spent / 50 * 1e6


def chain(sizes: Sizes) -> dict[str, Any]:
    """The linears of a block of a 7B at one token, from a CUDA graph of eight blocks: microseconds a block."""
    blocks = sizes.of(8, 1)
    shapes = sizes.layers(*BLOCK_OF_7B) * blocks
    xs = {inputs: sizes.random(1, inputs) for _, inputs in shapes}
    dense = [sizes.random(*shape) for shape in shapes]
    found = {"dense": sizes.graph_us(lambda ws=dense: [linear(xs[w.shape[1]], w) for w in ws]) / blocks}  # type: ignore[misc]
    for bits in (2, 3, 4):
        packed = [sizes.packed(*shape, bits) for shape in shapes]
        with torch.no_grad():
            call = lambda ws=packed: [quant_linear(xs[w[3].in_features], *w, impl=sizes.impl) for w in ws]  # noqa: E731
            found[f"{bits} bits"] = sizes.graph_us(call) / blocks
    return found


def rows(sizes: Sizes) -> dict[str, Any]:
    """From how many rows on dequantizing first is faster: microseconds of either way, 2 bits."""
    from eqat_kernels.quant_linear import few_rows

    found: dict[str, Any] = {}
    for outputs, inputs in sizes.layers(SEVEN_B[0], SEVENTY_B[1]):
        packed = sizes.packed(outputs, inputs, 2)
        for count in (2, 4, 6, 8, 16):
            x = sizes.random(count, inputs)
            first = sizes.device_us(lambda x=x, w=packed: linear(x, dequantize(*w, x.dtype, impl=sizes.impl)))  # type: ignore[misc]
            direct = sizes.device_us(lambda x=x, w=packed: few_rows.forward(x, *w, None))  # type: ignore[misc]
            found[f"{outputs}x{inputs}, {count} rows"] = {"direct": direct, "dequantized first": first}
    return found


def many(sizes: Sizes) -> dict[str, Any]:
    """Training: TFLOP/s of y, dx and ds beside the dense product; microseconds of dequantizing."""
    from eqat_kernels.dispatch import implementation

    found: dict[str, Any] = {}
    module = implementation("quant_linear", sizes.impl)
    for (outputs, inputs), count in product(sizes.layers(SEVEN_B[0], SEVENTY_B[1]), (2048, 8192)):
        count = sizes.of(count, 40)
        x, grad, dense = sizes.random(count, inputs), sizes.random(count, outputs), sizes.random(outputs, inputs)
        flop = 2 * count * outputs * inputs / 1e6
        row = found[f"{outputs}x{inputs}, {count} rows"] = {
            "dense": flop / sizes.device_us(lambda x=x, w=dense: linear(x, w))
        }  # type: ignore[misc]
        for bits in (2, 3, 4):
            packed = sizes.packed(outputs, inputs, bits)
            calls = {
                "y": lambda x=x, w=packed: module.forward(x, *w, None),
                "dx": lambda x=x, g=grad, w=packed: module.backward(g, x, *w, (True, False)),
                "ds": lambda x=x, g=grad, w=packed: module.backward(g, x, *w, (False, True)),
            }
            with torch.no_grad():
                row |= {f"{bits} bits, {name}": flop / sizes.device_us(call) for name, call in calls.items()}
                call = lambda w=packed: dequantize(*w, torch.bfloat16, impl=sizes.impl)  # noqa: E731
                row[f"{bits} bits, dequantize us"] = sizes.device_us(call)
    return found


LAST = {"tests": (_TESTS_S + 5.0, tests)}
PARTS = {
    "machine": (10.0, machine),
    "decode": (35.0, decode),
    "chain": (10.0, chain),
    "rows": (5.0, rows),
    "many": (15.0, many),
}
