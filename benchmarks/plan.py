"""The plan beside what was published and what was measured.

    python benchmarks/plan.py             all three tables
    python benchmarks/plan.py here        one of: paper, h200, here

`paper` has the figures of EfficientQAT (arXiv 2407.11062; one A100-80GB, settings and costs of its own implementation),
`h200` those measured on a card with this package. `here` runs small models in the shape of SmolLM2-135M on this CPU,
each in a process of its own, and compares peak resident memory, bytes written and processor seconds per thread.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from eqat_mm.blocks.source import open_model
from eqat_mm.checkpoint.read import load
from eqat_mm.checkpoint.write import save_like
from eqat_mm.commands.plumbing.shapes import model_shape
from eqat_mm.plan.amounts import Phase
from eqat_mm.plan.block_ap import plan_block_ap
from eqat_mm.plan.costs import ORIGINAL
from eqat_mm.plan.e2e_qp import plan_e2e_qp
from eqat_mm.plan.end_to_end import text_work
from eqat_mm.plan.machine import card, this_machine
from eqat_mm.plan.models import shipped_config
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.block_ap import BlockAPConfig, run_block_ap
from eqat_mm.train.e2e_qp import E2EQPConfig, run_e2e_qp
from eqat_mm.train.end_to_end import WindowDataset, training_arguments
from eqat_mm.train.fit import FitConfig
from eqat_mm.train.rtn import run_rtn
from llava_adapters import arch_of_folder

SPEC = QuantSpec(bits=2, group_size=64)
CPU = torch.device("cpu")
PAPER = BlockAPConfig(stream_dtype="bfloat16")
"""The published settings."""


@dataclass(frozen=True)
class Row:
    """One figure: predicted, and published or measured."""

    what: str
    predicted: float
    known: float
    unit: str

    def __str__(self) -> str:
        off = self.predicted / self.known - 1
        return f"{self.what:<46}{self.predicted:>10.2f}{self.known:>10.2f} {self.unit:<3}{off:>+7.1%}"


# ---- published ------------------------------------------------------------------------------------

BLOCK_AP = {"llama-2-7b": (8.5, 3.3), "llama-2-13b": (10.3, None), "llama-2-70b": (29.9, 26.6)}
"""GB and hours."""
E2E_QP = {"llama-2-7b": (5.6, 1.5), "llama-2-13b": (9.1, None), "llama-2-70b": (34.2, 41 - 26.6)}
"""GB at 2 bits, and hours; 41 hours are both phases of 70B."""


def paper() -> Iterator[Row]:
    """Yield what was published for one A100-80GB."""
    for model, (memory, hours) in BLOCK_AP.items():
        phase = plan_block_ap(model_shape(model), PAPER, text_work(4096, 2048), card("a100"), ORIGINAL)
        yield from _published(f"{model} Block-AP", phase, memory, hours)
    for model, (memory, hours) in E2E_QP.items():
        settings = E2EQPConfig(batch_size=1, accumulation=32)
        phase = plan_e2e_qp(model_shape(model), SPEC, settings, text_work(4096, 4096), card("a100"), ORIGINAL)
        yield from _published(f"{model} E2E-QP", phase, memory, hours)


def _published(what: str, phase: Phase, memory: float, hours: float | None) -> Iterator[Row]:
    yield Row(f"{what}, GPU", phase.gpu.total / 1e9, memory, "GB")
    if hours is not None:
        yield Row(f"{what}, time", phase.seconds.total / 3600, hours, "h")


# ---- measured on a card ---------------------------------------------------------------------------


def h200() -> Iterator[Row]:
    """Yield what was measured on an H200; the time of a Block-AP step is where two of the constants come from."""
    shape, machine = model_shape("llama-2-7b"), card("h200")
    phase = plan_block_ap(shape, PAPER, text_work(4096, 2048), machine)
    yield Row("7B Block-AP, GPU, 2 x 2048", phase.gpu.total / 1e9, 5.26, "GB")
    step = phase.seconds.terms[0].value / (len(shape.blocks) * 4032)
    yield Row("7B Block-AP, a step (calibration)", 1e3 * step, 6.3 + 8.0 + 1.2 + 2.0 + 0.2, "ms")
    settings = E2EQPConfig(gradient_checkpointing=True, accumulation=1)
    for name, memory, seconds in (("7B", 7.98, 0.976), ("13B", 12.55, 1.763), ("70B", 46.71, 8.233)):
        phase = plan_e2e_qp(model_shape(f"llama-2-{name.lower()}"), SPEC, settings, text_work(2, 4096), machine)
        yield Row(f"{name} E2E-QP, GPU, 2 x 4096", phase.gpu.total / 1e9, memory, "GB")
        writing = sum(term.value for term in phase.seconds.terms if term.what == "writing")
        yield Row(f"{name} E2E-QP, a step", phase.seconds.total - writing, seconds, "s")


# ---- measured here --------------------------------------------------------------------------------


def here() -> Iterator[Row]:
    """Yield what small runs take on this CPU."""
    for samples, length, blocks in ((256, 512, 2), (1024, 256, 3)):
        with TemporaryDirectory() as folder:
            model = _model(Path(folder), blocks)
            what = f"Block-AP, {blocks} blocks, {samples} x {length}"
            yield from _rows(what, *_in_process(_block_ap, model, folder, samples, length))
    for batch, length in ((4, 256), (2, 1024)):
        with TemporaryDirectory() as folder:
            model = _model(Path(folder), 6)
            yield from _rows(
                f"E2E-QP, 6 blocks, {batch} x {length}", *_in_process(_e2e_qp, model, folder, batch, length)
            )


def _rows(what: str, phase: Phase, found: dict[str, float]) -> Iterator[Row]:
    process = phase.ram.terms[0].value
    yield Row(f"{what}, RAM", phase.ram.total / 1e6, found["ram"] / 1e6, "MB")
    yield Row(f"{what}, process apart", (phase.ram.total - process) / 1e6, (found["ram"] - process) / 1e6, "MB")
    yield Row(f"{what}, written", phase.written.total / 1e6, found["written"] / 1e6, "MB")
    yield Row(f"{what}, time", phase.seconds.total, found["seconds"], "s")


def _model(folder: Path, blocks: int) -> str:
    """Save a random model in the shape of SmolLM2-135M; return its folder."""
    config = shipped_config("smollm2-135m")  # the demo brings it
    assert config is not None
    fields = {name: value for name, value in config.items() if name != "model_type"} | {"num_hidden_layers": blocks}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    model.save_pretrained(folder / "model-source")
    return str(folder / "model-source")


def _tokens(samples: int, length: int) -> torch.Tensor:
    return torch.randint(0, 49_000, (samples, length), generator=torch.Generator().manual_seed(0))


def _block_ap(model: str, folder: str, samples: int, length: int) -> tuple[Phase, dict[str, float]]:
    """Run Block-AP; return its plan and what it took."""
    config = BlockAPConfig(quant=SPEC, fit=FitConfig(epochs=1, batch_size=4, validation_samples=32))
    phase = plan_block_ap(model_shape(model), config, text_work(samples, length), this_machine(CPU, Path(folder)))
    path = Path(model)
    with _Measured() as found:
        opened = open_model(path, arch_of_folder(path))
        batches = [{"input_ids": window.unsqueeze(0)} for window in _tokens(samples, length)]
        record: dict[str, Any] = {"config": {}}
        run_block_ap(opened, batches, config, Path(folder), device=CPU, source=model, provenance=record)
    return phase, found.result


def _e2e_qp(model: str, folder: str, batch: int, length: int) -> tuple[Phase, dict[str, float]]:
    """Run E2E-QP on a model rounded to nearest; return its plan and what it took."""
    settings = E2EQPConfig(batch_size=batch, accumulation=2, max_steps=12)
    path, record = Path(model), dict[str, Any](config={})
    run_rtn(open_model(path, arch_of_folder(path)), SPEC, Path(folder) / "rtn", source=model, provenance=record)
    machine = this_machine(CPU, Path(folder))
    phase = plan_e2e_qp(model_shape(model), SPEC, settings, text_work(24 * batch, length), machine)
    with _Measured() as found:
        packed = load(Path(folder) / "rtn" / "model")
        arguments = training_arguments(settings, Path(folder) / "trainer", CPU)
        run_e2e_qp(packed, WindowDataset(_tokens(24 * batch, length)), settings, arguments, teacher=None)
        save_like(packed, Path(folder) / "tuned", Path(folder) / "rtn" / "model", "e2e-qp", record)
    return phase, found.result


class _Measured:
    """Peak resident memory, bytes handed to the file system and seconds of what runs inside."""

    result: dict[str, float]

    def __enter__(self) -> _Measured:
        self._written, self._start = _written(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.result = {
            "ram": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "written": _written() - self._written,
            "seconds": (time.process_time() - self._start) / torch.get_num_threads(),
        }


def _written() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def _in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process, so that its peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


TABLES: dict[str, Callable[[], Iterator[Row]]] = {"paper": paper, "h200": h200, "here": here}


def main() -> None:
    """Print the chosen tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", choices=[[], *TABLES], help="default: all")
    parser.add_argument("--output", type=Path, help="also write the rows to this JSON file")
    arguments = parser.parse_args()
    found = {}
    for name in arguments.which or TABLES:
        print(f"\n{name:<46}{'plan':>10}{'known':>10}")
        found[name] = []
        for row in TABLES[name]():
            print(row, flush=True)
            found[name].append(vars(row))
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
