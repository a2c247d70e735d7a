"""Decode speed beside llama.cpp's, of one model at the same bits, on one thread of a CPU: their ratio in one run.

    python benchmarks/llama_cpp.py LIBRARIES CHECKPOINT FILE.gguf [CHECKPOINT FILE.gguf ..]

LIBRARIES is the folder of a prebuilt llama.cpp v0.5.0 (npm `@node-llama-cpp/linux-x64@3.22.1`, bins/linux-x64), FILE
what `eqat export RUN --to gguf` makes of the checkpoint. Both read the same prompt, then a token at a time, in turns of
a few tokens. What is compared is time of the processor, which other work on the machine disturbs less than that of the
clock.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import median

import torch

import eqat_mm
from eqat_eval.graphed_decode import DecodeStep
from eqat_mm.checkpoint.manifest import checkpoint_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "readers"))
from llama_cpp import Reader

PROMPT, TURNS, TOKENS = 16, 12, 8


def main() -> None:
    """Print a row for each pair of files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", type=Path)
    parser.add_argument("files", type=Path, nargs="+", metavar="CHECKPOINT FILE.gguf")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| checkpoint | eqat, tokens/s | llama.cpp, tokens/s | ratio | ratios of the turns |")
    print("|---|---|---|---|---|")
    for folder, file in zip(arguments.files[::2], arguments.files[1::2], strict=True):
        ours, theirs = turns(ours_of(folder), theirs_of(arguments.libraries, file))
        ratios = sorted(their / our for our, their in zip(ours, theirs, strict=True))
        speeds = [TOKENS / median(seconds) for seconds in (ours, theirs)]
        print(f"| {folder} | {speeds[0]:.1f} | {speeds[1]:.1f} | {speeds[0] / speeds[1]:.2f} |", end="")
        print(f" {ratios[0]:.2f} to {ratios[-1]:.2f} |")


def turns(*steps: Callable[[int], object]) -> tuple[list[float], ...]:
    """Return the seconds of the processor that each one needs for its turns, in which it reads `TOKENS` tokens."""
    found: tuple[list[float], ...] = tuple([] for _ in steps)
    for turn in range(TURNS + 1):  # the first one is a warm-up
        for step, seconds in zip(steps, found, strict=True):
            started = time.process_time()
            for token in range(TOKENS):
                step(100 + turn * TOKENS + token)
            seconds.append(time.process_time() - started)
    return tuple(seconds[1:] for seconds in found)


def ours_of(folder: Path) -> Callable[[int], object]:
    """Return what reads a token with the packed model, and gives its logits."""
    model = eqat_mm.load(checkpoint_folder(folder))
    inputs = {"input_ids": torch.arange(PROMPT)[None], "attention_mask": torch.ones(1, PROMPT, dtype=torch.long)}
    with torch.inference_mode():
        step = DecodeStep(model, inputs, TOKENS * (TURNS + 1), graph=True)

    def read(token: int) -> object:
        with torch.inference_mode():
            return step(torch.tensor([token]))

    return read


def theirs_of(libraries: Path, file: Path) -> Callable[[int], object]:
    """Return the same of llama.cpp."""
    reader, places = Reader(libraries, file), count(PROMPT)
    reader.read(list(range(PROMPT)))
    return lambda token: reader.read([token], next(places))


if __name__ == "__main__":
    main()
