"""Time the kernel layer: on a GPU against what the device can do, on a CPU as ratios to the dense model.

    python benchmarks/time_kernels.py                 on whatever is there
    python benchmarks/time_kernels.py --cpu           on the CPU: training step, decode and prefill, peak memory
    python benchmarks/time_kernels.py --cpu --only peers     beside torch.compile and torch's int4 product
    python benchmarks/time_kernels.py --tune          on a GPU: sizes of the decode kernel, and where it loses

The correctness sweep runs first. Where a test fails no number is printed.

Not called `kernels.py`: transformers imports a public package of that name, and would find this file.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from kernel_peers import Layer
from time_kernels_cpu import cpu_ratios
from timing import device_seconds
from torch import Tensor

from eqat_kernels import dequantize, fake_quantize, quant_linear
from eqat_kernels.quant_linear import few_rows

LAYERS = {
    "7B": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "13B": ((5120, 5120), (13824, 5120), (5120, 13824)),
    "70B": ((8192, 8192), (28672, 8192), (8192, 28672)),
}
"""(O, I) of the linear layers of Llama-2."""

ROWS = (1, 16, 2048)
FEW = (1, 2, 3, 4, 6, 8)
GROUP = 64
ROOT = Path(__file__).resolve().parents[1]


def require_green(marker: str) -> None:
    """Run the correctness sweep; leave if it is red."""
    tests = ["tests/kernels/test_triton.py"] if marker == "gpu" else ["tests/kernels/test_cpu.py"]
    command = [sys.executable, "-m", "pytest", "-q", *tests]
    command += ["-n", "auto", "-m", "gpu"] if marker == "gpu" else ["-n", "0"]
    interpret = {"TRITON_INTERPRET": "0" if marker == "gpu" else "1"}
    if subprocess.run(command, cwd=ROOT, env=os.environ | interpret, check=False).returncode:
        sys.exit("the correctness sweep is red: no numbers")


def measured_limits() -> tuple[float, float]:
    """Bytes per second of a copy of 1 GiB, and operations per second of an 8192^3 bfloat16 product."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * source.numel() / device_seconds(lambda: target.copy_(source)), 2 * 8192**3 / device_seconds(
        lambda: square @ square
    )


class DeviceLayer(Layer):
    """A random packed layer on the device and its twins for torch's products."""

    def __init__(self, outputs: int, inputs: int, bits: int) -> None:
        super().__init__(outputs, inputs, bits, "cuda")
        self.torch_int4 = self.int4(torch.bfloat16) if bits == 4 else None
        self.dense = dequantize(*self.stored, torch.bfloat16)

    def bytes(self) -> int:
        """Packed words, step sizes and zero points."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.words, self.scale, self.zero_words))

    @torch.no_grad()
    def run(self, x: Tensor) -> Tensor:
        """Forward."""
        return quant_linear(x, *self.stored, impl="triton")


def forward_table(limits: tuple[float, float]) -> None:
    """Print the forward of every layer: time, share of the measured limits, ratios to torch's products."""
    columns = f"{'us':>9} {'copy rate':>9} {'FLOP rate':>9} {'dense/packed':>12} {'torch int4/packed':>17}"
    print(f"{'layer':>18} bits rows {columns}")
    for (name, shapes), bits in product(LAYERS.items(), (2, 3, 4, 8)):
        for outputs, inputs in shapes:
            layer = DeviceLayer(outputs, inputs, bits)
            for rows in ROWS:
                x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
                packed_s = device_seconds(lambda layer=layer, x=x: layer.run(x))  # type: ignore[misc]
                dense_s = device_seconds(lambda layer=layer, x=x: torch.nn.functional.linear(x, layer.dense))  # type: ignore[misc]
                moved = (layer.bytes() + 2 * rows * (inputs + outputs)) / packed_s / limits[0]
                done = 2 * rows * outputs * inputs / packed_s / limits[1]
                label, peer = f"{name} {outputs}x{inputs}", ""
                if layer.torch_int4 is not None:
                    peer = f"{device_seconds(lambda layer=layer, x=x: layer.torch_int4.run(x)) / packed_s:17.2f}"  # type: ignore[misc]
                print(
                    f"{label:>18} {bits:4} {rows:4} {packed_s * 1e6:9.1f} {moved:9.1%} {done:9.1%}"
                    f" {dense_s / packed_s:12.2f} {peer}"
                )


def training_table(limits: tuple[float, float]) -> None:
    """Print backward and elementwise ops on the layers of 7B, 2048 rows."""
    print(f"\n{'layer':>14} bits {'forward+backward us':>20} {'dequantize':>10} {'fake_quantize f+b':>18}")
    for (outputs, inputs), bits in product(LAYERS["7B"], (2, 3, 4, 8)):
        layer = DeviceLayer(outputs, inputs, bits)
        layer.scale.requires_grad_()
        x = torch.randn(2048, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(2048, outputs, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(outputs, inputs, device="cuda", requires_grad=True)
        zero = torch.full_like(layer.scale, 1.0).requires_grad_()

        def step(layer: DeviceLayer = layer, x: Tensor = x, grad: Tensor = grad) -> None:
            quant_linear(x, layer.words, layer.scale, layer.zero_words, layer.layout, impl="triton").backward(grad)

        def fake(layer: DeviceLayer = layer, weight: Tensor = weight, zero: Tensor = zero, bits: int = bits) -> None:
            fake_quantize(weight, layer.scale, zero, bits, impl="triton").backward(weight.detach())

        dense_s = device_seconds(
            lambda layer=layer: dequantize(  # type: ignore[misc]
                layer.words, layer.scale.detach(), layer.zero_words, layer.layout, torch.bfloat16, impl="triton"
            )
        )
        dense_rate = (layer.bytes() + 2 * outputs * inputs) / dense_s / limits[0]
        fake_rate = 20 * outputs * inputs / (fake_s := device_seconds(fake)) / limits[0]
        print(
            f"{f'{outputs}x{inputs}':>14} {bits:4} {device_seconds(step) * 1e6:20.1f} {dense_rate:10.1%}"
            f" {fake_s * 1e6:10.1f} {fake_rate:7.1%}"
        )


def tune() -> None:
    """Print, per layer and bit width, a decode step by sizes of its kernel, and from how many rows on it loses."""
    for (outputs, inputs), bits in product((*LAYERS["7B"], *LAYERS["70B"]), (2, 3, 4, 8)):
        layer = DeviceLayer(outputs, inputs, bits)
        x = torch.randn(max(FEW), inputs, device="cuda", dtype=torch.bfloat16)
        found = {}
        for of_program, units in product((4, 8), (64, 128)):
            with mock.patch.multiple(few_rows, OUTPUTS=of_program, UNITS=units):
                found[of_program, units] = device_seconds(lambda layer=layer, x=x: layer.run(x[:1]), 10)  # type: ignore[misc]
        print(f"{outputs}x{inputs}, {bits} bits, us: " + "  ".join(f"{at} {s * 1e6:.1f}" for at, s in found.items()))
        for most in (0, max(FEW)):
            with mock.patch.object(few_rows, "MOST", most):
                times = [device_seconds(lambda layer=layer, x=x, rows=rows: layer.run(x[:rows]), 10) for rows in FEW]  # type: ignore[misc]
            print(f"  {'unpacked while' if most else 'unpacked before':>15}", *(f"{s * 1e6:7.1f}" for s in times))


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the CPU, even where there is a GPU")
    parser.add_argument("--tune", action="store_true", help="try sizes of the decode kernel on the GPU")
    parser.add_argument("--only", nargs="+", help="CPU: some of step, step-7b, memory, decode, peers")
    arguments = parser.parse_args()
    if arguments.cpu or not torch.cuda.is_available():
        require_green("cpu")
        cpu_ratios(arguments.only)
        return
    require_green("gpu")
    if arguments.tune:
        tune()
        return
    limits = measured_limits()
    print(f"{torch.cuda.get_device_name()}: copy {limits[0] / 1e12:.2f} TB/s, bfloat16 {limits[1] / 1e12:.0f} TFLOP/s")
    forward_table(limits)
    training_table(limits)


if __name__ == "__main__":
    main()
