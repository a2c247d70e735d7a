"""What changed between a kill and the next start: refused with both values, or continued, as the docs say."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eqat_mm.commands.plumbing.launchers import free_port
from eqat_mm.commands.verbs.quantize import rtn
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.sealed import read_sealed, write_sealed
from tests.checkpoint.files import contents
from tests.commands.jobs import rtn_job
from tests.commands.launching import run
from tests.faults.cases import BLOCK_AP, CONVERSATIONS, E2E_QP, GENERATE_DATA, LLM_QAT, RTN, Case, Place
from tests.faults.conftest import Bench, Tally
from tests.faults.test_kills import KILLED, names
from tests.faults.warm import ROOT, Ended, Fault, send

BLOCKS = BLOCK_AP["ram", "recompute"]
STREAMS = BLOCK_AP["disk", "files"]
REFUSED, SAID, SILENT = "refused", "continued, said", "continued, silently"
ON = "this run goes on with"


def table() -> dict[str, str]:
    """The rows of the table in docs/operations.md."""
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = text.partition("## What may change when a run goes on")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+) \| (refused|continued, said|continued, silently) \|$", section, re.MULTILINE)
    return dict(rows)


@dataclass(frozen=True)
class Change:
    """Something that is otherwise at the next start.

    Attributes:
        of: the command.
        more: words added to it.
        environment: variables.
        place: the same with other contents or at another place, made in an empty folder.
        record: of the run: what to write in it as if it had been begun elsewhere.
        both: words that a refusal shows.
    """

    of: Case
    more: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    place: Callable[[Place, Path], Place] = lambda place, folder: place
    record: tuple[str, ...] = ()
    both: tuple[str, ...] = ()


def copied(place: Place, folder: Path) -> Place:
    """The same files at another place."""
    tiny = replace(place.tiny, folder=folder / "model" / "tiny-llama", text=folder / "words.txt")
    shutil.copytree(place.tiny.folder, tiny.folder)
    shutil.copy(place.tiny.text, tiny.text)
    shutil.copytree(place.base, folder / "base")
    shutil.copytree(place.conversations.parent, folder / "images")
    return replace(place, tiny=tiny, base=folder / "base", conversations=folder / "images" / place.conversations.name)


def other_weights(place: Place, folder: Path) -> Place:
    new = copied(place, folder)
    file = new.tiny.folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 0.25
    save_file(tensors, file, metadata={"format": "pt"})
    return new


def other_config(place: Place, folder: Path) -> Place:
    new = copied(place, folder)
    file = new.tiny.folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 1e-3}))
    return new


def other_tokenizer(place: Place, folder: Path) -> Place:
    new = copied(place, folder)
    file = new.tiny.folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"w7"', '"v7"'))
    return new


def other_base(place: Place, folder: Path) -> Place:
    new = copied(place, folder)
    shutil.rmtree(new.base)
    rtn(replace(rtn_job(place.tiny, folder / "again"), quant=QuantSpec(3, 32)))
    (folder / "again" / "model").rename(new.base)
    return new


def other_text(place: Place, folder: Path) -> Place:
    new = copied(place, folder)
    new.tiny.text.write_text(new.tiny.text.read_text().replace("w5 ", "w6 "))
    return new


def other_conversations(place: Place, folder: Path) -> Place:
    new = copied(place, folder)
    records = json.loads(new.conversations.read_text())
    for record in records:
        record["conversations"][-1]["value"] += " w5"
    new.conversations.write_text(json.dumps(records))
    return new


CHANGES: dict[str, list[Change]] = {
    "any setting of the method: bits, learning rates, epochs, losses, `--seed`": [
        Change(STREAMS, ("--quant.bits=3",), both=("bits=3", "bits=2")),
        Change(BLOCKS, ("--seed=1",), both=("seed=1", "seed=0")),
        Change(BLOCKS, ("--fit.epochs=2",), both=("epochs=2", "epochs=1")),
        Change(E2E_QP, ("--learning_rate=1e-3",), both=("0.001", "0.002")),
        Change(E2E_QP, ("--loss=cross-entropy",), both=("cross-entropy", "kl")),
        Change(E2E_QP, ("--max_steps=5",), both=("max_steps=5", "max_steps=4")),
        Change(LLM_QAT, ("--bits=8-8-8",), both=("8-8-8", "4-8-4")),
        Change(GENERATE_DATA, ("--length=13",), both=("length=13", "length=12")),
        Change(RTN, ("--quant.group_size=64",), both=("group_size=64", "group_size=32")),
    ],
    "`--fit.batch_size` of Block-AP": [Change(BLOCKS, ("--fit.batch_size=1",), both=("batch_size=1",))],
    "`--precision`, `--stream_dtype` to another than `auto` chose": [
        Change(BLOCKS, ("--stream_dtype=bfloat16",), both=("bfloat16", "float32")),
        Change(E2E_QP, ("--precision=bfloat16",), both=("bfloat16", "float32")),
    ],
    "weights, configuration or tokenizer of the model": [
        *(Change(case, place=other_weights, both=("inputs.model",)) for case in (RTN, BLOCKS, LLM_QAT, GENERATE_DATA)),
        Change(E2E_QP, place=other_weights, both=("inputs.model",)),  # it teaches
        Change(BLOCKS, place=other_config, both=("inputs.model",)),
        Change(BLOCKS, place=other_tokenizer, both=("inputs.",)),
    ],
    "the checkpoint `--quantized`": [Change(E2E_QP, place=other_base, both=("inputs.quantized",))],
    "the text; the conversations, more of them than `--conversations.max_skipped`": [
        *(Change(case, place=other_text, both=("inputs.data",)) for case in (BLOCKS, E2E_QP, LLM_QAT)),
        Change(CONVERSATIONS, place=other_conversations, both=("inputs.data",)),
    ],
    "`--batch_size` x `--accumulation`, another product": [
        Change(E2E_QP, ("--batch_size=2",), both=("samples_per_step=2", "samples_per_step=4"))
    ],
    "`--batch_size` x `--accumulation`, the same product": [
        Change(case, ("--batch_size=2", "--accumulation=2")) for case in (E2E_QP, LLM_QAT)
    ],
    "`--save_steps`, `--logging_steps`, `--gradient_checkpointing`, `--report_to`": [
        Change(E2E_QP, ("--save_steps=1",)),
        Change(LLM_QAT, ("--gradient_checkpointing=true", "--save_steps=0")),
    ],
    "`--spool`, `--commit`": [
        Change(BLOCKS, ("--spool=disk", "--commit=files")),
        Change(STREAMS, ("--spool=ram", "--commit=recompute")),
        Change(STREAMS, ("--spool=ram",)),
    ],
    "`--output`, `--model`, `--quantized`: the same files at another place": [
        Change(case, place=copied) for case in (BLOCKS, STREAMS, E2E_QP, LLM_QAT, GENERATE_DATA)
    ],
    "number of threads (`OMP_NUM_THREADS`)": [Change(BLOCKS, environment=(("OMP_NUM_THREADS", "2"),))],
    "kernels (`EQAT_KERNELS`)": [
        Change(case, environment=(("EQAT_KERNELS", "reference"),)) for case in (BLOCKS, E2E_QP)
    ],
    "`--device`, another GPU": [Change(BLOCKS, record=("environment", "device", "NVIDIA H100"))],
    "versions of torch, transformers and others": [Change(E2E_QP, record=("versions", "torch", "2.0.0"))],
}
OTHERS = "number of processes of E2E-QP and LLM-QAT, other samples per step"
ALIKE = "number of processes of E2E-QP and LLM-QAT, the same samples per step (`--global_batch`)"
ZERO = "stage of ZeRO, DeepSpeed or not"
LAUNCHED = {"number of processes of Block-AP", OTHERS, ALIKE, ZERO}
PAIRS = [
    pytest.param(row, change, id=f"{change.of.name}-{row[:30]}-{index}")
    for row, changes in CHANGES.items()
    for index, change in enumerate(changes)
]


@pytest.fixture(scope="module")
def killed(bench: Bench) -> Callable[[Case], Path]:
    """The folder of a command that was killed on its way; not to be altered."""
    folders: dict[str, Path] = {}

    def made(case: Case) -> Path:
        if case.name not in folders:
            folder = folders[case.name] = bench.new()
            part = 0.3 if case is GENERATE_DATA else 0.62
            ended = bench.run(case, folder, Fault(before_operation=int(part * bench.whole(case)[1].operations)))
            assert ended.status == KILLED
        return folders[case.name]

    return made


def goes_on(bench: Bench, change: Change, killed: Path) -> tuple[Ended, Path]:
    """Copy the folder of a killed run and start its command with a change."""
    folder = bench.new()
    shutil.copytree(killed, folder, dirs_exist_ok=True)
    if change.record:
        part, name, value = change.record
        file = folder / "run" / "run.json"
        record = read_sealed(file)
        record[part][name] = value
        write_sealed(file, record)
    other = folder.with_name(f"{folder.name}-place")
    other.mkdir()
    words = [*change.of.words(change.place(bench.place, other), change.of.output(folder)), *change.more]
    return bench.warm.run(words, Fault(environment=dict(change.environment))), folder


def test_the_table_has_the_rows_that_are_tried() -> None:
    assert set(table()) == set(CHANGES) | LAUNCHED


def wrong_with(bench: Bench, row: str, change: Change, killed: Path) -> list[str]:
    """What is otherwise than the row of the table says."""
    wanted = table()[row]
    ended, folder = goes_on(bench, change, killed)
    if wanted == REFUSED:
        wrong = [] if ended.four_lines else [f"status {ended.status}: {ended.out} {ended.err}"]
        wrong += [f"{words!r} is not in {ended.err}" for words in change.both if words not in ended.err]
        return wrong + ([] if without_lock(folder) == without_lock(killed) else ["the folder was altered"])
    wrong = [] if ended.status == 0 else [ended.err]
    wrong += [] if (ON in ended.out) == (wanted == SAID) else [f"said: {ended.out}"]
    return wrong + unlike(bench, change, folder)


def without_lock(folder: Path) -> dict[str, bytes]:
    """Every file, but for the lock that a dead process left."""
    return {name: content for name, content in contents(folder).items() if not name.endswith("run.lock")}


def unlike(bench: Bench, change: Change, folder: Path) -> list[str]:
    """What is otherwise than undisturbed, apart from last bits where they may differ."""
    if change.environment or any("batch_size" in word for word in change.more):
        whole = bench.folder / "out" / "whole" / change.of.name.replace(" ", "-")
        if not whole.exists():
            whole.mkdir(parents=True)
            assert bench.run(change.of, whole).status == 0
        return [] if nearly_equal(folder / "run" / "model", whole / "run" / "model") else ["other numbers"]
    settled = ("run/metrics.jsonl", "run/run.json", "run/state.json") if change.more else ("run/run.json",)
    return [name for name in bench.unlike(change.of, folder) if name not in settled]


def nearly_equal(left: Path, right: Path) -> bool:
    """Whether two checkpoints hold the same step sizes and norms, but for rounding."""
    for file in right.glob("*.safetensors"):
        ours, theirs = load_file(left / file.name), load_file(file)
        for name, value in theirs.items():
            if value.is_floating_point() and not torch.allclose(
                ours[name].float(), value.float(), atol=2e-3, rtol=2e-2
            ):
                return False
    return True


QUICK = {  # the index of the change that the default run tries
    "any setting of the method: bits, learning rates, epochs, losses, `--seed`": 0,
    "weights, configuration or tokenizer of the model": 0,
    "the checkpoint `--quantized`": 0,
    "`--spool`, `--commit`": 1,
}


@pytest.mark.parametrize(("row", "index"), QUICK.items())
def test_a_change_is_as_the_table_says(
    bench: Bench, tally: Tally, killed: Callable[[Case], Path], row: str, index: int
) -> None:
    change = CHANGES[row][index]
    tally(f"between kill and resume, {table()[row]}", 1, wrong_with(bench, row, change, killed(change.of))[:1])


@pytest.mark.faults
@pytest.mark.parametrize(("row", "change"), PAIRS)
def test_every_change_is_as_the_table_says(
    bench: Bench, tally: Tally, killed: Callable[[Case], Path], row: str, change: Change
) -> None:
    tally(f"between kill and resume, {table()[row]}", 1, wrong_with(bench, row, change, killed(change.of))[:1])


@pytest.mark.faults
@pytest.mark.parametrize(("row", "change"), [pair for pair in PAIRS if table().get(str(pair.values[0])) == REFUSED])
def test_a_finished_run_is_refused_likewise(bench: Bench, tally: Tally, row: str, change: Change) -> None:
    folder = bench.new()
    assert bench.run(change.of, folder).status == 0
    wrong = wrong_with(bench, row, change, folder)
    tally("changed after a run is finished, refused", 1, wrong[:1])


@pytest.mark.faults
@pytest.mark.parametrize("case", [BLOCKS, STREAMS, E2E_QP, CONVERSATIONS, LLM_QAT, GENERATE_DATA], ids=names)
def test_a_run_that_was_moved_goes_on(bench: Bench, tally: Tally, killed: Callable[[Case], Path], case: Case) -> None:
    folder, other = bench.new(), bench.new()
    shutil.copytree(killed(case), folder, dirs_exist_ok=True)
    other.rmdir()
    folder.rename(other)
    tally("run folder moved or copied between kill and resume", 1, bench.differences(case, other))


# ---- several processes ------------------------------------------------------------------------------


def launched(words: list[str], processes: int) -> Any:
    launcher = ["torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(free_port())]
    return run([sys.executable, "-m", *launcher, "-m", "eqat_mm", *words])


@pytest.mark.faults
@pytest.mark.parametrize("case", [BLOCKS, STREAMS], ids=names)
def test_another_number_of_processes_of_block_ap(
    bench: Bench, tally: Tally, killed: Callable[[Case], Path], case: Case
) -> None:
    folder = bench.new()
    shutil.copytree(killed(case), folder, dirs_exist_ok=True)
    done = launched(case.words(bench.place, case.output(folder)), 2)
    row = "number of processes of Block-AP"
    wrong = [] if done.returncode == 0 and f"{ON} processes 2 (was 1)" in done.stdout else [done.stderr[-2000:]]
    tally(f"between kill and resume, {table()[row]}", 1, wrong)


@pytest.mark.faults
@pytest.mark.parametrize(("deepspeed", "row"), [([], ALIKE), (["--deepspeed=zero-2"], ZERO)])
def test_as_many_samples_in_another_number_of_processes_of_e2e_qp(
    bench: Bench, tally: Tally, killed: Callable[[Case], Path], deepspeed: list[str], row: str
) -> None:
    folder = bench.new()
    shutil.copytree(killed(E2E_QP), folder, dirs_exist_ok=True)
    words = E2E_QP.words(bench.place, E2E_QP.output(folder))
    done = launched([*words, "--batch_size=2", "--global_batch=4", *deepspeed], 2)
    wrong = [] if done.returncode == 0 and f"{ON} processes 2 (was 1)" in done.stdout else [done.stderr[-2000:]]
    tally(f"between kill and resume, {table()[row]}", 1, wrong)


@pytest.mark.faults
def test_other_samples_in_another_number_of_processes_of_e2e_qp(
    bench: Bench, tally: Tally, killed: Callable[[Case], Path]
) -> None:
    folder = bench.new()
    shutil.copytree(killed(E2E_QP), folder, dirs_exist_ok=True)
    done = launched(E2E_QP.words(bench.place, E2E_QP.output(folder)), 2)
    refused = done.returncode != 0 and "ConfigError\n  where: " in done.stderr  # and the launcher's own traceback
    wrong = [] if refused and not (folder / "run" / "model").exists() else [done.stderr]
    tally(f"between kill and resume, {table()[OTHERS]}", 1, wrong)


# ---- two at once ------------------------------------------------------------------------------------


def second(bench: Bench, case: Case, *more: str) -> list[str]:
    """Start a command where the same is at work, which is held up so long; return what went wrong."""
    folder = bench.new()
    words = case.words(bench.place, case.output(folder))
    lock = (folder / ".texts.jsonl.parts" if case is GENERATE_DATA else folder / "run") / "run.lock"
    with bench.warm.started(words) as (process, told):
        while not (lock.is_file() and lock.read_text()):
            assert process.is_alive()
        send(process, signal.SIGSTOP)
        ended = bench.run(case, folder, None, *more)
        send(process, signal.SIGCONT)
        process.join()
        first = told(0.0)
    refused = ended.four_lines and f"process {process.pid} on" in ended.err
    wrong = [] if refused else [f"the second: {ended.status}, {ended.out} {ended.err}"]
    wrong += [] if first.status == 0 else [f"the first: {first.err}"]
    return wrong + bench.unlike(case, folder)


def test_a_second_process_is_refused(bench: Bench, tally: Tally) -> None:
    tally("two processes on one run", 1, second(bench, STREAMS)[:1])


@pytest.mark.faults
@pytest.mark.parametrize("more", [[], ["--overwrite=true"]], ids=["same", "overwrite"])
@pytest.mark.parametrize("case", [STREAMS, E2E_QP, LLM_QAT], ids=names)
def test_second_processes_are_refused(bench: Bench, tally: Tally, case: Case, more: list[str]) -> None:
    for _ in range(3):
        tally("two processes on one run", 1, second(bench, case, *more)[:1])
