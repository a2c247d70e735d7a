"""Speed and memory of the training paths, as ratios taken side by side in one run.

    python benchmarks/run.py              all of them, on SmolLM2-135M
    python benchmarks/run.py block-step   one of: block-step, block-memory, e2e, packing

Times are medians of interleaved repetitions, so that noise of the machine meets both sides; `block-step` gives medians
over several processes. Peak memory is the growth of the resident set in a process of its own, from after the imports
and a first training step to the peak.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from timing import interleaved
from torch import Tensor, nn

from eqat_kernels import pack, unpack
from eqat_mm.blocks.arch import set_submodule
from eqat_mm.blocks.source import OpenModel, open_model
from eqat_mm.blocks.walker import BlockWalker, capture_front
from eqat_mm.checkpoint.read import load
from eqat_mm.commands.plumbing.models import load_model, model_folder
from eqat_mm.quant.convert import to_fake
from eqat_mm.quant.fake_linear import fake_quant_linears, project
from eqat_mm.quant.init import initial_grid
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.block_ap import BlockAPConfig, run_block_ap
from eqat_mm.train.e2e_qp import scale_parameters
from eqat_mm.train.fit import FitConfig, trainable_parameters
from eqat_mm.train.losses import block_loss, cross_entropy, predictions_that_count
from eqat_mm.train.rtn import run_rtn
from llava_adapters import arch_of_folder

MODEL = "smollm2-135m"
SPEC = QuantSpec(bits=2, group_size=64)
TOKENS = 256
PROCESSES = 5
"""Where a process's memory lies moves a ratio by some hundredths, however often it repeats."""

CPU = torch.device("cpu")


def block_step() -> dict[str, Any]:
    """Time a training step of one block on 4 x 256 tokens: fake-quantized over plain, float32 and bfloat16."""
    runs = [_in_process(_block_step) for _ in range(PROCESSES)]
    return {precision: _medians([run[precision] for run in runs]) for precision in runs[0]}


def _block_step() -> dict[str, dict[str, float]]:
    """Run `block_step` once, in a process of its own."""
    result = {}
    for precision in ("float32", "bfloat16"):
        walker = _walker(8, precision)
        step = next(walker.walk())
        plain = copy.deepcopy(step.block).requires_grad_(True)
        for path, linear in walker.opened.arch.named_linears(step.block):
            grid = initial_grid(linear.weight, SPEC, layer=path, init="minmax")
            set_submodule(step.block, path, to_fake(linear, grid, SPEC))
        call, hidden = step.call(range(4)), step.quantized.gather(range(4))
        target = step.fp.gather(range(4, 8))
        fake = trainable_parameters(step.block, FitConfig())

        def train(block: nn.Module, groups: list[dict[str, Any]], w: Any, c: Any, h: Any, t: Any) -> Callable[[], None]:
            optimizer = torch.optim.AdamW(groups, fused=True)
            linears = fake_quant_linears(block)

            def run() -> None:
                optimizer.zero_grad()
                block_loss(w.run(block, c, h), t).backward()
                optimizer.step()
                project(linears)

            return run

        quantized = train(step.block, fake, walker, call, hidden, target)
        reference = train(plain, [{"params": list(plain.parameters()), "lr": 1e-4}], walker, call, hidden, target)
        fast, slow = interleaved([reference, quantized], 40)
        result[precision] = {"plain_ms": fast * 1e3, "fake_quantized_ms": slow * 1e3, "ratio": slow / fast}
    return result


def block_memory() -> dict[str, Any]:
    """Peak memory of Block-AP over one float32 block with gradients and AdamW, plus both activation streams."""
    opened = _opened()
    batches = _batches(256)
    parameters = sum(parameter.numel() for parameter in opened.blocks[0].parameters())
    block = parameters * 4 * 4
    spool = 2 * len(batches) * TOKENS * opened.model.config.hidden_size * 4
    opened.model.model.layers = opened.model.model.layers[:2]
    config = BlockAPConfig(quant=SPEC, fit=FitConfig(epochs=1, batch_size=4), batch_tokens=1024)
    _warm_up()
    before = psutil.Process().memory_info().rss
    with TemporaryDirectory() as folder:
        record: dict[str, Any] = {"config": {}}
        run_block_ap(opened, batches, config, Path(folder), device=CPU, source=MODEL, provenance=record)
    peak = _peak() - before
    floor = block + spool
    return {"peak_MiB": peak / 2**20, "block_MiB": block / 2**20, "spool_MiB": spool / 2**20, "ratio": peak / floor}


def e2e() -> dict[str, Any]:
    """Time and peak memory of a training step on 4 x 256 tokens: packed step sizes over dense weights, float32."""
    with TemporaryDirectory() as folder:
        run_rtn(_opened(), SPEC, Path(folder), source=MODEL, provenance={"config": {}})
        sides = {name: _in_process(_e2e_side, name, folder) for name in ("dense", "packed")}
    return {
        **{f"{name}_{key}": value for name, side in sides.items() for key, value in side.items()},
        "time_ratio": sides["packed"]["step_s"] / sides["dense"]["step_s"],
        "memory_ratio": sides["packed"]["peak_MiB"] / sides["dense"]["peak_MiB"],
    }


def packing() -> dict[str, Any]:
    """Codes packed and unpacked per second, millions, one 4096 x 4096 matrix."""
    result = {}
    for bits in (2, 3, 4, 8):
        codes = torch.randint(0, 1 << bits, (4096, 4096), dtype=torch.uint8)
        words = pack(codes, bits)
        packing_s, unpacking_s = interleaved(
            [
                lambda c=codes, b=bits: pack(c, b),  # type: ignore[misc]
                lambda w=words, b=bits: unpack(w, b, 4096),  # type: ignore[misc]
            ],
            5,
        )
        millions = codes.numel() / 1e6
        result[f"{bits} bits"] = {"pack_M_per_s": millions / packing_s, "unpack_M_per_s": millions / unpacking_s}
    return result


def _e2e_side(name: str, folder: str) -> dict[str, float]:
    """One side of `e2e`, in a process of its own."""
    _warm_up()
    before = psutil.Process().memory_info().rss
    if name == "packed":
        model = load(Path(folder) / "model")
        parameters = scale_parameters(model)
    else:
        model = load_model(model_folder(MODEL), CPU)
        arch = arch_of_folder(model_folder(MODEL))
        blocks = arch.find_blocks(model)
        parameters = [linear.weight for block in blocks for _, linear in arch.named_linears(block)]
        for parameter in parameters:
            parameter.requires_grad_(True)
    model.train()
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    tokens = torch.cat([batch["input_ids"] for batch in _batches(4)])

    def step() -> None:
        optimizer.zero_grad()
        columns, labels = predictions_that_count(tokens)
        cross_entropy(model(input_ids=tokens, use_cache=False, logits_to_keep=columns).logits, labels).backward()
        optimizer.step()

    times = [_seconds(step) for _ in range(4)]
    return {"step_s": statistics.median(times[1:]), "peak_MiB": (_peak() - before) / 2**20}


def _warm_up() -> None:
    """Make torch load what it loads at the first training step, so that it does not count as memory of the run."""
    layer = nn.Linear(64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(64, 64)).sum().backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()


def _opened() -> OpenModel:
    folder = model_folder(MODEL)
    return open_model(folder, arch_of_folder(folder))


def _walker(samples: int, precision: Any) -> BlockWalker:
    opened = _opened()
    captured = capture_front(opened, _batches(samples), torch.float32)
    return BlockWalker(opened, captured, device=CPU, precision=precision)


def _batches(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 40_000, (1, TOKENS), generator=generator)} for _ in range(count)]


def _medians(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Return the median of each figure over the runs, and all ratios."""
    result: dict[str, Any] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return result | {"ratios": [round(run["ratio"], 3) for run in runs]}


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process, so that its peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


BENCHMARKS: dict[str, Callable[[], dict[str, Any]]] = {
    "block-step": block_step,
    "block-memory": block_memory,
    "e2e": e2e,
    "packing": packing,
}
STARTS_PROCESSES = (block_step, e2e)


def main() -> None:
    """Run the chosen benchmarks and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", choices=[[], *BENCHMARKS], help="default: all")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    model_folder(MODEL)
    print(f"{MODEL}, {SPEC.name}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    results = {}
    for name in arguments.which or BENCHMARKS:
        function = BENCHMARKS[name]
        results[name] = function() if function in STARTS_PROCESSES else _in_process(function)
        print(f"\n{name}: {str(function.__doc__).strip()}")
        print(json.dumps(results[name], indent=2, default=float))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
