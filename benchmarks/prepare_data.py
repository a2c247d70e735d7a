"""What it costs to look through instruction data once, to start with what was found, and to read a sample.

    python benchmarks/prepare_data.py FOLDER [--records 665298] [--model demo-llava] [--odd]

FOLDER gets the stand-in of `instruction_mix.py` unless it is there. Each line is from a process of its own: CPU seconds
are those of all its children, too; memory is the growth over what the libraries take, at its peak, of the largest one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from instruction_mix import RECORDS, write_mix

from eqat_mm.checkpoint.speaker import load_speaker
from eqat_mm.commands.plumbing.models import model_folder
from eqat_mm.data.image_text.batching import SampleOrder
from eqat_mm.data.image_text.samples import image_text_data
from eqat_mm.data.image_text.settings import ImageTextData

SAMPLES = 100


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Return seconds, CPU seconds and MiB that some work takes in a process of its own, and what it returns."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(work, sender))
    process.start()
    found: dict[str, float] = receiver.recv()
    process.join()
    return found


def _measure(work: Callable[[], Any], sender: Any) -> None:
    load_speaker(model_folder(work.model))  # libraries and tokenizer
    memory, cpu, started = psutil.Process().memory_info().rss, _cpu(), time.perf_counter()
    returned = work()
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024
    facts = {"seconds": time.perf_counter() - started, "cpu seconds": _cpu() - cpu, "MiB": (peak - memory) / 2**20}
    sender.send({name: round(value, 1) for name, value in facts.items()} | returned)


class Start:
    """The start of a run: the samples and their order, as `e2e-qp` makes them."""

    def __init__(self, model: str, config: ImageTextData) -> None:
        self.model, self.config = model, config

    def __call__(self) -> dict[str, float]:
        """Return the number of samples."""
        data = image_text_data(load_speaker(model_folder(self.model)), self.config)
        next(iter(SampleOrder(data.lengths, data.text_only, 128, seed=0)))
        return {"samples": len(data)}


class Samples(Start):
    """Reading, decoding and encoding samples."""

    def __call__(self) -> dict[str, float]:
        """Return CPU milliseconds per sample."""
        data = image_text_data(load_speaker(model_folder(self.model)), self.config)
        data[0]
        cpu = _cpu()
        for index in range(SAMPLES):
            data[index * len(data) // SAMPLES]
        return {"cpu ms per sample": round((_cpu() - cpu) / SAMPLES * 1e3, 2)}


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main() -> None:
    """Print a table as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=RECORDS)
    parser.add_argument("--model", default="demo-llava")
    parser.add_argument("--odd", action="store_true")
    given = parser.parse_args()
    file = given.folder / "mix.json"
    if not file.is_file():
        write_mix(given.folder, given.records, 200, odd=given.odd)
    shutil.rmtree(file.with_name("mix.json.prepared"), ignore_errors=True)
    config = ImageTextData(str(file), given.folder / "images", on_bad_sample="skip")
    for what, kind in (("without an index", Start), ("with an index", Start), ("samples", Samples)):
        print(json.dumps({"what": what} | measured(kind(given.model, config))), flush=True)


if __name__ == "__main__":
    main()
