"""The ladder of `eqat demo-vlm` on one large GPU: its own commands, several at a time.

    python benchmarks/ladder_side_by_side.py --model demo-llava-mini-vqa --task mini_vqa --conversations demo-mini-vqa \
        --bits 4 3 2 --steps 200 --output runs/mini-vlm

A small model leaves most of a large GPU idle, so rungs are made and asked beside each other. What is made from
another model waits for it, and every answer is compared with those of full precision, which come first. The rows are in
`<output>/ladder.json` as soon as they are known; a rung that fails is named, and the others go on. What commands say is
in `<output>/logs`. The same command again continues what was stopped; what was asked is not asked again. On a CPU,
`OMP_NUM_THREADS=1` and `--at_a_time` the number of cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock, Semaphore
from typing import Any, get_args

from eqat_mm.commands.plumbing.models import model_folder
from eqat_mm.commands.tables.vlm_ladder import blind_accuracy, row_of, table, verdict_in
from eqat_mm.commands.tables.vlm_rungs import FULL_PRECISION, Rung, VLMLadderJob, asking, rungs
from eqat_mm.runtime.files import write_json
from eqat_mm.runtime.progress import say
from eqat_mm.train.losses import Loss


class SideBySide:
    """Makes and asks rungs, a number of them at a time."""

    def __init__(self, job: VLMLadderJob, at_a_time: int) -> None:
        self.job, self.rungs = job, list(rungs(job, model_folder(job.model)))
        self.free, self.lock, self.rows = Semaphore(at_a_time), Lock(), []  # type: ignore[var-annotated]
        self.made = {str(rung.folder): Event() for rung in self.rungs}
        self.full = self.job.output / f"{FULL_PRECISION}.json"
        self.answered = Event()

    def climb(self) -> list[dict[str, Any]]:
        """Make and ask all of them."""
        with ThreadPoolExecutor(len(self.rungs)) as threads:
            list(threads.map(self._climbed, self.rungs))
        return sorted(self.rows, key=lambda row: self._place(row["bits"], row["stage"]))

    def _climbed(self, rung: Rung) -> None:
        try:
            self._make(rung)
            self._ask(rung)
        except subprocess.CalledProcessError as error:
            say(f"{rung.stage}, {rung.bits} bits: failed, {error}")
        finally:
            if rung.stage == FULL_PRECISION:
                self.answered.set()

    def _make(self, rung: Rung) -> None:
        if rung.command is None:
            return
        if "--quantized" in rung.command:
            self.made[rung.command[rung.command.index("--quantized") + 1]].wait()
        try:
            self._run(rung, rung.command, "make")
        finally:
            self.made[str(rung.folder)].set()

    def _ask(self, rung: Rung) -> None:
        is_full = rung.stage == FULL_PRECISION
        output, reference = (self.full, None) if is_full else (rung.folder.parent / "asked.json", self.full)
        if not is_full:
            self.answered.wait()
        if not output.is_file():
            self._run(rung, asking(rung, self.job.questions, self.job, output, reference), "ask")
        with self.lock:
            self.rows.append(row_of(rung, verdict_in(output, self.job)))
            write_json(self.job.output / "ladder.json", {"rows": self.rows})

    def _run(self, rung: Rung, words: Sequence[str], what: str) -> None:
        log = self.job.output / "logs" / f"{rung.bits} bits, {rung.stage}, {what}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with self.free, log.open("w") as file:
            say(f"{rung.stage}, {rung.bits} bits: {what}")
            own = {"OMP_NUM_THREADS": "2"} | dict(os.environ)
            subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, env=own, check=True)

    def _place(self, bits: int, stage: str) -> int:
        return [(rung.bits, rung.stage) for rung in self.rungs].index((bits, stage))


def main() -> None:
    """Climb, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-llava-mini-vqa", help="full-precision model")
    parser.add_argument("--task", default="mini_vqa", help="of lmms-eval")
    parser.add_argument("--conversations", default="demo-mini-vqa", help="that E2E-QP and LoRA learn from")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], help="bit widths")
    parser.add_argument("--steps", type=int, help="of E2E-QP and LoRA; those of the recipe by default")
    parser.add_argument("--loss", choices=get_args(Loss), help="of both")
    parser.add_argument("--questions", type=int, default=3000, help="asked of every model")
    parser.add_argument("--batch_size", type=int, default=256, help="questions a forward")
    parser.add_argument("--at_a_time", type=int, default=8, help="commands beside each other")
    parser.add_argument("--output", type=Path, default=Path("runs/ladder"), help="folder of all runs")
    given = vars(parser.parse_args())
    at_a_time, questions = given.pop("at_a_time"), given.pop("questions")
    given |= {"bits": tuple(given["bits"]), "questions": questions, "questions_full_precision": questions}
    job = VLMLadderJob(**given, images=True, lora=True, projector=True, processes=1)
    print(table(SideBySide(job, at_a_time).climb(), blind_accuracy(job.task)))


if __name__ == "__main__":
    main()
