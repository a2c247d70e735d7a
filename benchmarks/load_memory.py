"""Memory that loading a packed checkpoint takes, and a forward behind it, beside the size of its files.

    python benchmarks/load_memory.py runs/smollm2-135m-w2g64/rtn/model
    python benchmarks/load_memory.py --layers 10 --width 2048 --bits 2   # a Llama of random numbers in bfloat16

Each way of loading has a process of its own; what is counted is its resident memory at the peak, pages of mapped files
included, less what it had once a tiny checkpoint was loaded and used the same way. `all read` is behind a pass over
every number, so that nothing of the files is left unread. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

import eqat_mm
from eqat_mm.blocks.source import open_model
from eqat_mm.checkpoint.adapters import teach_peft
from eqat_mm.checkpoint.build import skeleton
from eqat_mm.checkpoint.manifest import checkpoint_folder, read_manifest
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.provenance import provenance
from eqat_mm.train.rtn import run_rtn
from llava_adapters import arch_for

WAYS = ("eqat_mm.load", "from_pretrained")
TINY = {"layers": 1, "width": 256, "vocabulary": 64}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="packed checkpoint; none makes one of random numbers")
    for name, default in {"layers": 10, "width": 2048, "vocabulary": 32000, "bits": 2, "group_size": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("--way", "--dtype", "--tiny"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way is not None:
        used(Path(arguments.tiny), arguments.way, arguments.dtype)
        print(json.dumps(used(arguments.folder, arguments.way, arguments.dtype)))
        return
    with TemporaryDirectory() as scratch:
        tiny = made(argparse.Namespace(**vars(arguments) | TINY), Path(scratch) / "tiny")
        given = arguments.folder
        table(made(arguments, Path(scratch) / "whole") if given is None else checkpoint_folder(given), tiny)


def table(folder: Path, tiny: Path) -> None:
    """Print a row for each way and dtype."""
    files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"{folder.name}: {QuantSpec(**read_manifest(folder).spec).name}, files {files / 1e6:.1f} MB")
    print("| | dtype | loaded, MB | of the files | all read | of the files | forward of 16 tokens |")
    print("|---|---|---|---|---|---|---|")
    for way in WAYS:
        for dtype in ("auto", "bfloat16", "float32"):
            found = child(folder, tiny, way, dtype)
            shares = (f"{found[stage] / 1e6:.1f} | {found[stage] / files:.2f}" for stage in ("loaded", "all read"))
            print(f"| {way} | {dtype} | {' | '.join(shares)} | {found['forward'] / 1e6:.1f} |")


def child(folder: Path, tiny: Path, way: str, dtype: str) -> dict[str, int]:
    """Return what a process of its own measured."""
    command = [sys.executable, __file__, str(folder), "--way", way, "--dtype", dtype, "--tiny", str(tiny)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@torch.no_grad()
def used(folder: Path, way: str, dtype: str) -> dict[str, int]:
    """Load a checkpoint, read all of it, use it; return the bytes of each peak beyond those at the beginning."""
    manifest = read_manifest(folder)
    auto: Any = getattr(transformers, manifest.auto_class or "AutoModelForCausalLM")
    skeleton(folder, manifest)  # imports what there is
    teach_peft()
    before, found = resident("VmRSS"), {}
    kept = getattr(torch, dtype, dtype)
    model: Any = eqat_mm.load(folder, dtype=kept) if way == WAYS[0] else auto.from_pretrained(folder, dtype=kept)
    found["loaded"] = resident("VmHWM") - before
    for tensor in model.state_dict().values():
        tensor.min()
    found["all read"] = resident("VmHWM") - before
    model(input_ids=torch.arange(16)[None])
    found["forward"] = resident("VmHWM") - before
    return found


def resident(field: str) -> int:
    """Return the resident memory of this process, now (VmRSS) or at its highest (VmHWM), in bytes."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows[field].split()[0]) * 1024


def made(arguments: argparse.Namespace, scratch: Path) -> Path:
    """Return the checkpoint of a Llama of random numbers, rounded to nearest."""
    width = arguments.width
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=arguments.layers,
        num_attention_heads=width // 64, vocab_size=arguments.vocabulary, dtype="bfloat16",
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(scratch / "full")
    spec, opened = QuantSpec(arguments.bits, arguments.group_size), open_model(scratch / "full", arch_for("llama"))
    run_rtn(opened, spec, scratch, source="random", provenance=provenance("load_memory", {}, 0))
    return scratch / "model"


if __name__ == "__main__":
    main()
