"""Compile every Triton kernel ahead of time, without a GPU, and print what it needs.

    python -m eqat_kernels.aot                   all kernels and bit widths, from sm_80 to sm_120
    python -m eqat_kernels.aot --arch 90         one architecture
    python -m eqat_kernels.aot --markdown        as a table for the documentation

Each kernel is compiled for every bit width as it is launched on a 4096 x 4096 layer with groups of 64, asymmetric, in
bfloat16; sums of weight gradients in float32, too, and at 4 bits in float16. To fake quantization the width is only a
number. Registers are per thread, spills the bytes of local memory a thread lacks registers for, shared memory is per
program. Instructions are per weight: those of the
largest loop, or of a kernel without one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from eqat_kernels.cached_attention import triton_impl as cached_attention
from eqat_kernels.columns import triton_impl as columns_in_turn
from eqat_kernels.dequant import triton_impl as dequant
from eqat_kernels.fake_quant import triton_impl as fake_quant
from eqat_kernels.layout import BITS, PackedLayout, columns_of_tile
from eqat_kernels.machine_code import instructions, resources
from eqat_kernels.packing import triton_impl as packing
from eqat_kernels.quant_linear import few_rows
from eqat_kernels.quant_linear import triton_impl as quant_linear

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
GROUP, SIZE = 64, 4096
ALIGNED = ("inputs", "outputs", "row_count", "columns_count", "length", "words", "groups", "group_size", "size")
"""Sizes of a layer, multiples of 16 in every large model: Triton compiles a version of its own for that."""


LIMITS = {"quant_linear few rows": 4.5, "quant_linear ds": 11.0, "dequantize": 12.0, "fake_quantize": 42.0}
"""Instructions per weight, by the beginning of a kernel's name, above which something is wrong."""


@dataclass(frozen=True)
class Kernel:
    """One kernel as it is launched.

    Attributes:
        name: for the table.
        function: decorated with `triton.jit`.
        pointers: dtype of every pointer argument, by name.
        constants: constexpr arguments, by name.
        options: `num_warps`, where not Triton's own choice.
    """

    name: str
    function: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]

    @property
    def weights(self) -> int:
        """Weights of a thread, in a pass of its loop where it has one; 0 where weights are not what it works on."""
        if "UNITS_OF_GROUP" in self.constants:
            return int(self.constants["N"]) * few_rows.UNIT
        rows, columns = self.constants.get("R", 0), self.constants.get("K", 0)
        return int(rows * columns) // (32 * self.options.get("num_warps", 4))


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel needs: registers and bytes spilled per thread, shared bytes per program, and its work."""

    name: str
    arch: int
    registers: int
    spills: int
    shared: int
    per_weight: float | None

    def __str__(self) -> str:
        cell = f"{self.registers} / {self.spills} / {self.shared:,}"
        return cell if self.per_weight is None else f"{cell} / {self.per_weight:.1f}"

    def faults(self) -> Iterator[str]:
        """Say what is wrong with it."""
        where = f"{self.name} on sm_{self.arch}"
        if self.spills:
            yield f"{where}: {self.spills} bytes spilled"
        limit = next((value for name, value in LIMITS.items() if self.name.startswith(name)), None)
        if self.per_weight is not None and limit is not None and self.per_weight > limit:
            yield f"{where}: {self.per_weight:.1f} instructions per weight, at most {limit}"


def kernels() -> Iterator[Kernel]:
    """Every kernel for every bit width."""
    yield from _fake_quantize()
    yield from _columns()
    yield from _cached_attention()
    for bits in BITS:
        yield from _elementwise(bits)
        for dtype in ("bf16", "fp32", "fp16") if bits == 4 else ("bf16", "fp32"):
            yield from _products(bits, dtype)


def _fake_quantize() -> Iterator[Kernel]:
    rows, columns = fake_quant.tile_of(GROUP)
    tile = {"BITS": 2, "R": rows, "K": columns}
    for product in ("fp32", "bf16"):  # the dtype of W_hat; W, s and z are float32
        forward, backward = _types("fp32", out=product), _types("fp32", grad=product)
        yield Kernel(f"fake_quantize forward {product}", fake_quant.forward_kernel, forward, tile, {})
        name, kernel = f"fake_quantize backward {product}", fake_quant.backward_kernel
        yield Kernel(name, kernel, backward, tile | {"out_ptr": None}, {})
        yield Kernel(f"{name}, W_hat again", kernel, backward | {"out_ptr": f"*{product}"}, tile, {})


def _columns() -> Iterator[Kernel]:
    for columns in (GROUP, 128):
        rows, width = columns_in_turn.tile_of(columns)
        for kernel in (columns_in_turn.compensate_kernel, columns_in_turn.descend_kernel):
            name = f"{kernel.__name__.removesuffix('_kernel')} {columns} columns"
            yield Kernel(name, kernel, _types("fp32"), {"R": rows, "B": width}, {})


def _cached_attention() -> Iterator[Kernel]:
    values = {"q": "*bf16", "out": "*fp32", "top": "*fp32", "sum": "*fp32", "k": "*u8", "v": "*u8"}
    types = {f"{name}_ptr": kind for name, kind in values.items()} | {"scaling": "fp32"}
    for bits in (4, 8):
        for channels in (64, 128, 256):
            tile = cached_attention.tile_of(8, channels, bits) | {"mask_ptr": None, "FACTOR": tl.bfloat16}
            options = cached_attention.options(channels, bits)
            name = f"cached_attention {bits} bits, {channels} channels"
            yield Kernel(name, cached_attention.attend_kernel, types, tile, options)


def _elementwise(bits: int) -> Iterator[Kernel]:
    columns = columns_of_tile(_layout(bits), 64)
    tile = {"BITS": bits, "R": dequant.ROWS, "K": columns}
    yield Kernel(f"dequantize w{bits} bf16", dequant.dequantize_kernel, _types("bf16"), tile, {})
    tile = {"BITS": bits, "R": packing.ROWS, "K": packing.COLUMNS}
    yield Kernel(f"unpack w{bits}", packing.unpack_kernel, _types("u8"), tile, {})
    tile = {"BITS": bits, "R": packing.ROWS, "W": packing.WORDS}
    yield Kernel(f"pack w{bits}", packing.pack_kernel, _types("u8"), tile, {})


def _products(bits: int, dtype: str) -> Iterator[Kernel]:
    group_units = GROUP // few_rows.UNIT
    tile = {"N": few_rows.OUTPUTS, "U": few_rows.UNITS, "UNITS_OF_GROUP": group_units}
    if dtype == "bf16":
        options = {"num_warps": few_rows.UNITS // 32}
        name, types = f"quant_linear few rows w{bits} {dtype}", _types(dtype)
        yield Kernel(name, few_rows.few_rows_kernel, types, {"BITS": bits, "bias_ptr": None, **tile}, options)
    tile = {"BITS": bits, "R": quant_linear.ROWS, "K": columns_of_tile(_layout(bits), quant_linear.COLUMNS)}
    types = _types("fp32", grad_w=dtype)
    yield Kernel(f"quant_linear ds w{bits} {dtype}", quant_linear.scale_gradient_kernel, types, tile, {})


def _layout(bits: int) -> PackedLayout:
    return PackedLayout(bits, GROUP, SIZE, SIZE)


def _types(values: str, **others: str) -> dict[str, str]:
    """Pointer types by argument name: words and zero points int32, step sizes and sums float32, all else `values`."""
    fixed = {"words": "i32", "zeros": "i32", "scale": "fp32", "grad_s": "fp32", "grad_z": "fp32"}
    names = (
        "x",
        "y",
        "w",
        "s",
        "z",
        "out",
        "bias",
        "codes",
        "weight",
        "grad",
        "grad_w",
        "grad_x",
        "factor",
        "error",
        "c",
        "residual",
        "h",
        "wanted",
    )
    return {f"{name}_ptr": f"*{kind}" for name, kind in ({**dict.fromkeys(names, values), **fixed} | others).items()}


def compile_for(kernel: Kernel, arch: int) -> Compiled:
    """Compile one kernel for one architecture to machine code."""
    names = kernel.function.arg_names
    constants = kernel.constants
    signature = {name: "constexpr" if name in constants else kernel.pointers.get(name, "i32") for name in names}
    # what the launcher finds out at run time: pointers and the sizes of a layer are multiples of 16
    unit = {name for name in names if name.endswith("_column")}
    constants = constants | dict.fromkeys(unit, 1)
    signature |= dict.fromkeys(unit, "constexpr")
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name.endswith(("_ptr", "_row")) or name in ALIGNED
        if signature[name] != "constexpr"
    }
    source = ASTSource(kernel.function, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=kernel.options)
    cubin = compiled.asm["cubin"]
    per_weight = instructions(cubin) / kernel.weights if kernel.weights else None
    return Compiled(kernel.name, arch, *resources(cubin), compiled.metadata.shared, per_weight)


def table(results: list[Compiled], *, markdown: bool) -> str:
    """Lay out registers / spills / shared memory / instructions, kernels in rows, architectures in columns."""
    architectures = sorted({result.arch for result in results})
    cells = {(result.name, result.arch): result for result in results}
    heads = ["kernel", *(f"sm_{arch} regs/spills/shared/per weight" for arch in architectures)]
    rows = [heads]
    for name in dict.fromkeys(result.name for result in results):
        found = (cells[name, arch] for arch in architectures)
        rows.append([name, *map(str, found)])
    if markdown:
        rows.insert(1, ["---"] * len(heads))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def _compile_one(index: int, arch: int) -> Compiled:
    return compile_for(list(kernels())[index], arch)


def main() -> int:
    """Compile and print; return 1 if a kernel spills or does too much."""
    parser = argparse.ArgumentParser(prog="python -m eqat_kernels.aot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, such as 90")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    arguments = parser.parse_args()
    if not isinstance(packing.pack_kernel, triton.JITFunction):
        sys.exit("TRITON_INTERPRET is set: nothing would be compiled; unset it")
    chosen = [index for index, kernel in enumerate(kernels()) if arguments.only in kernel.name]
    jobs = [(index, arch) for index in chosen for arch in arguments.arch]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(_compile_one, *zip(*jobs, strict=True)))
    print(table(results, markdown=arguments.markdown))  # noqa: T201 - the table is what this command is for
    faults = [fault for result in results for fault in result.faults()]
    print("\n".join([f"{len(results)} kernels compiled, {len(faults)} faults", *faults]))  # noqa: T201
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
