"""Block-AP and a step of E2E-QP by command on blocks as wide as a 7B's, on a CPU: is their peak memory as planned?

    python benchmarks/real_shapes.py                     Llama-2-7B's blocks, two of them and four
    python benchmarks/real_shapes.py --llava --blocks 1 --hidden 5120 --inner 13824 --heads 40
                                                         one of LLaVA-1.5-13B's, vision tower and all

Weights are random, bfloat16, in several safetensors files; tokenizer and text are those of the demo. Peak memory is the
largest resident set of the command, beside what `eqat plan` says for the same settings. That of Block-AP is one
block's, whatever the depth; E2E-QP holds all blocks packed, and trains here on windows of text.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers

from eqat_demo.smollm2 import smollm2_folder
from eqat_mm.commands.plumbing.shapes import model_shape
from eqat_mm.plan.amounts import Phase
from eqat_mm.plan.block_ap import plan_block_ap
from eqat_mm.plan.e2e_qp import plan_e2e_qp
from eqat_mm.plan.end_to_end import text_work
from eqat_mm.plan.machine import this_machine
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.block_ap import BlockAPConfig
from eqat_mm.train.e2e_qp import E2EQPConfig
from eqat_mm.train.fit import FitConfig

SAMPLES, LENGTH = 8, 256
SPEC = QuantSpec(2, 64)
FIT = FitConfig(epochs=1, validation_samples=2)
BLOCK_AP = BlockAPConfig(quant=SPEC, fit=FIT, precision="float32", spool="ram")
E2E_QP = E2EQPConfig(batch_size=2, accumulation=1, max_steps=1, gradient_checkpointing=True, precision="float32")


def save_model(folder: Path, arguments: argparse.Namespace, blocks: int) -> None:
    """Write a random Llama, or a LLaVA around it, in files of at most 500 MB, with the tokenizer of the demo."""
    config = text = transformers.LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.inner,
        num_attention_heads=arguments.heads,
        num_hidden_layers=blocks,
        vocab_size=49152,
        tie_word_embeddings=False,
    )
    if arguments.llava:
        config = transformers.LlavaConfig(text_config=text, image_token_index=49151)  # CLIP-L/336 is the default tower
    torch.set_default_dtype(torch.bfloat16)
    kind = transformers.LlavaForConditionalGeneration if arguments.llava else transformers.LlamaForCausalLM
    kind(config).save_pretrained(folder, max_shard_size="500MB")
    torch.set_default_dtype(torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2_folder() / name, folder / name)


def block_ap(model: Path, run: Path) -> list[str]:
    """Return the words of Block-AP with `BLOCK_AP`."""
    words = ["block-ap", "--model", str(model), "--output", str(run), "--quant.bits=2", "--precision=float32"]
    words += ["--calibration.source=demo-wikipedia"]
    words += [f"--calibration.length={LENGTH}", f"--calibration.count={SAMPLES}"]
    return [*words, "--fit.epochs=1", "--fit.validation_samples=2", "--spool=ram"]


def e2e_qp(model: Path, packed: Path, run: Path) -> list[str]:
    """Return the words of a step of E2E-QP with `E2E_QP`."""
    words = ["e2e-qp", "--model", str(model), "--quantized", str(packed), "--output", str(run), "--text_only=true"]
    words += [f"--data.length={LENGTH}", f"--data.count={SAMPLES}", "--data.source=demo-wikipedia", "--max_steps=1"]
    return [*words, "--batch_size=2", "--accumulation=1", "--gradient_checkpointing=true", "--precision=float32"]


def measure(arguments: list[str]) -> tuple[float, float]:
    """Return the peak resident set in GB and the seconds of an `eqat` command."""
    words = [str(Path(sys.executable).with_name("eqat")), *arguments]
    begun = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(words)}: status {status}")
    return usage.ru_maxrss * 1024 / 1e9, time.monotonic() - begun


def phases(folder: Path) -> Iterator[tuple[Phase, list[str]]]:
    """Yield the plan of both phases for the model in a folder, and their commands."""
    model, machine = folder / "model", this_machine(torch.device("cpu"), folder)
    shape = model_shape(str(model))
    work = text_work(SAMPLES, LENGTH)
    yield plan_block_ap(shape, BLOCK_AP, work, machine), block_ap(model, folder / "run")
    yield plan_e2e_qp(shape, SPEC, E2E_QP, work, machine), e2e_qp(model, folder / "run" / "model", folder / "tuned")


def main() -> None:
    """Print a line per depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096, help="width")
    parser.add_argument("--inner", type=int, default=11008, help="width of the MLP")
    parser.add_argument("--heads", type=int, default=32, help="attention heads")
    parser.add_argument("--llava", action="store_true", help="a LLaVA around it")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4], help="depths")
    arguments = parser.parse_args()
    for blocks in arguments.blocks:
        with TemporaryDirectory() as name:
            save_model(Path(name) / "model", arguments, blocks)
            for phase, words in phases(Path(name)):
                peak, seconds = measure(words)
                planned = f"planned {phase.ram.total / 1e9:.2f} GB"
                print(f"{blocks} blocks, {phase.name}: peak {peak:.2f} GB, {planned}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
