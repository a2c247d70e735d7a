"""The day of docs/llava.md on stand-ins: every command of it, and a training that is killed twice.

    python benchmarks/practitioner_day.py FOLDER [--records 20000] [--images 200] [--steps 48] [--text demo-wikipedia]

FOLDER gets what a day begins with (`stand_ins.py`). The commands are those of the document, word for word, but for
`REPLACED`; what downloads (`DOWNLOADS`) is not run, because the stand-ins are there. Then the training is started four
more times: killed by SIGKILL and continued, to the same numbers as the whole run; stopped by SIGTERM and continued in
one process, to the same weights within rounding. Printed is what each command took: seconds, CPU seconds of all its
processes, and the memory of the largest one at its peak.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from measured_command import Cost, Started, measured
from safetensors.torch import load_file
from stand_ins import write_stand_ins

from eqat_mm.commands.plumbing.launchers import free_port

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "llava.md"
DOWNLOADS = ("hf ", "wget ", "unzip ", "mkdir ", "pip ")
TYPED = "/image photo.jpg\nwhat is it?\n/quit\n"
"""To `eqat chat`; nothing else reads it."""

RUN = "runs/llava-1.5-7b-w2g64"
TOLERANCE = 1e-3
"""Largest difference of two runs on different numbers of processes, of the largest number of a tensor."""

REPLACED = (
    # this machine has two cores, and others may train on it
    (r"--num_gpus 8", "--num_gpus 2 --master_port {port}"),
    (r"--nproc_per_node 8", "--nproc_per_node 2 --master_port {port}"),
    # no recipe is tuned for a model of this size: that of the real one, on less text, for a few steps
    (
        r"eqat block-ap",
        "eqat block-ap --config llava-1.5-w2g64-block-ap --calibration.count 96 --calibration.length 256 "
        "--fit.validation_samples 16",
    ),
    (
        r"eqat_mm e2e-qp",
        "eqat_mm e2e-qp --config llava-1.5-w2g64-e2e-qp --max_steps {steps} --save_steps {save} --logging_steps 4 "
        "--learning_rate 1e-3 --precision float32",
    ),
    (r"--save_steps 500 ", ""),
    (r"--conversations\.held_out 256", "--conversations.held_out 16"),
    (r"--data\.source texts/", "--data.source texts/ --data.count 16 --data.length 256"),
    # the tasks of the paper are on the hub
    (r"--tasks llava-1\.5 --batch_size 16", "--tasks easy_vqa --limit 8 --batch_size 2"),
)
"""What is put in place of what: pattern, replacement."""

_DAY = re.compile(r"^## \d\d:\d\d.*?(?=^## (?!\d\d:\d\d)|\Z)", re.M | re.S)
_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.M | re.S)


class Place:
    """A folder with everything that a day begins with.

    Args:
        folder: to be made, or one of before.
        records: of the instruction mix.
        images: that they are about.
        steps: of the training.
        text: that all words come from.
    """

    def __init__(self, folder: Path, records: int, images: int, steps: int, text: str) -> None:
        self.folder = folder.resolve()
        self.steps = steps
        if not self.folder.exists():
            write_stand_ins(self.folder, records, images, text)
        self.environment = os.environ | {
            "HF_HOME": str(self.folder / "hf"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "EQAT_EASY_VQA": str(self.folder / "questions.parquet"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'eval'}:{ROOT / 'demo'}",
        }

    def replaced(self, command: str) -> str:
        """Return a command of the document as it is run here."""
        for pattern, by in REPLACED:
            by = by.format(port=free_port(), steps=self.steps, save=max(1, self.steps // 8))
            command = re.sub(pattern, by.replace("\\", r"\\"), command)
        return command

    def run(
        self, command: str, what: str | None = None, stop: Callable[[Started], None] = lambda started: None
    ) -> Cost:
        """Run a command of a shell, which `stop` may end; return what it took."""
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        log = logs / f"{len(list(logs.glob('*.txt'))):02}.txt"
        return measured(what or short(command), command, log, self.folder, self.environment, TYPED, stop)

    def signalled(self, number: signal.Signals, output: str, ranks: Sequence[str]) -> Callable[[Started], None]:
        """Return what sends a signal to processes of a training once there are two checkpoints."""

        def stop(started: Started) -> None:
            self._wait_for_checkpoint(output, started)
            for process in psutil.Process(started.pid).children(recursive=True):
                if _rank(process) in ranks:
                    process.send_signal(number)

        return stop

    def _wait_for_checkpoint(self, output: str, started: Started) -> None:
        trainer = self.folder / output / "trainer"
        while len(list(trainer.glob("checkpoint-*[0-9]/checkpoint.json"))) < 2:
            assert started.poll() is None, "it ended before its second checkpoint"
            time.sleep(0.1)

    def tensors(self, output: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a checkpoint by name."""
        files = sorted((self.folder / output / "model").glob("*.safetensors"))
        return {name: value for file in files for name, value in load_file(file).items()}


def commands_of_the_day(document: str) -> list[str]:
    """Return the commands in the sections that are headed by a time, in their order."""
    blocks = [block for section in _DAY.findall(document) for block in _BLOCK.findall(section)]
    lines = (line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return [" ".join(line.split()) for line in lines if line and not line.startswith("#")]


def is_run(command: str) -> bool:
    """Whether a command of the document is run here: no download, and no task without lmms-eval."""
    return not command.startswith(DOWNLOADS) and ("--tasks" not in command or find_spec("lmms_eval") is not None)


def documented(place: Place) -> Iterator[Cost]:
    """Run the commands of the document, and yield what each took."""
    for command in commands_of_the_day(DOCUMENT.read_text(encoding="utf-8")):
        if is_run(command):
            yield place.run(place.replaced(command), short(command))


def killed_and_continued(place: Place) -> Iterator[Cost]:
    """Train again with two interruptions, and yield what each took.

    Raises:
        AssertionError: the results are not those of the whole run.
    """
    commands = commands_of_the_day(DOCUMENT.read_text(encoding="utf-8"))
    (two,) = (place.replaced(command) for command in commands if "eqat_mm e2e-qp" in command)
    alone = re.sub(r"^deepspeed.*?eqat_mm e2e-qp", "eqat e2e-qp --deepspeed null", two)
    killed, moved = f"{RUN}/killed", f"{RUN}/moved"
    kill, end = place.signalled(signal.SIGKILL, killed, ["1"]), place.signalled(signal.SIGTERM, moved, ["0", "1"])
    yield place.run(f"{two} --output {killed}", "the training, a process killed by SIGKILL", kill)
    yield place.run(f"{two} --output {killed}", "the same command, which continues it")
    whole = place.tensors(f"{RUN}/e2e-qp")
    assert largest_difference(place.tensors(killed), whole) == 0, "not the numbers of the whole run"
    yield place.run(f"{two} --output {moved}", "the training, both processes stopped by SIGTERM", end)
    yield place.run(f"{alone} --output {moved}", "`eqat e2e-qp`, which continues it in one process")
    difference = largest_difference(place.tensors(moved), whole)
    assert difference < TOLERANCE, f"{difference} beside the whole run"
    print(f"continued by two processes: the same numbers; by one: {difference:.1e} of a tensor's largest")


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of two checkpoints, relative to the largest number of each tensor."""
    assert found.keys() == expected.keys()
    pairs = [(found[name].double(), expected[name].double()) for name in expected]
    return max(float((left - right).abs().max() / right.abs().max().clamp(min=1e-30)) for left, right in pairs)


def short(command: str) -> str:
    """Return what a command is called in a table."""
    if (launched := re.match(r"(deepspeed|torchrun) .*?eqat_mm (\S+)", command)) is not None:
        return f"`{launched[1]} {launched[2]}`"
    return f"`{' '.join(command.split()[:2])}`" if command.startswith("eqat ") else f"`{command}`"


def _rank(process: psutil.Process) -> str | None:
    try:
        found: str | None = process.environ().get("LOCAL_RANK")
    except psutil.Error:
        return None
    return found


def main() -> int:
    """Print a table, and where a command that should not have failed says why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--text", default="demo-wikipedia")
    given = parser.parse_args()
    place = Place(given.folder, given.records, given.images, given.steps, given.text)
    print(f"{given.records:,} records, {given.images} images, {given.steps} steps; {os.cpu_count()} cores")
    print("| command | seconds | CPU seconds | MiB |\n|---|---|---|---|", flush=True)
    for work in (documented, killed_and_continued):
        for cost in work(place):
            print(cost.row(), flush=True)
            if cost.status != 0 and "SIG" not in cost.what:
                print(cost.log.read_text(encoding="utf-8")[-4000:])
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
