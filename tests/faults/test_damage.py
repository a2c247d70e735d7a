"""Every file of a run or a checkpoint, spoilt in every way: named before it is used, or of no consequence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands.jobs import e2e_qp_job
from tests.faults.cases import BLOCK_AP, CONVERSATIONS, E2E_QP, GENERATE_DATA, LADDERS, LLM_QAT, RTN, Case, words_of
from tests.faults.conftest import POINTS, Bench, Tally
from tests.faults.test_kills import KILLED, names, spread
from tests.faults.warm import Ended, Fault
from tests.tiny_model import Tiny

STREAMS = BLOCK_AP["disk", "files"]


# ---- ways to spoil a file ---------------------------------------------------------------------------


def truncate(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def fill_with_zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def remove(file: Path) -> None:
    file.unlink()


def swap(file: Path) -> None:
    """Exchange it with its next sibling of the same type."""
    siblings = sorted(path for path in file.parent.glob(f"*{file.suffix}") if path.is_file())
    other = siblings[(siblings.index(file) + 1) % len(siblings)]
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)


SPOIL = (truncate, flip_a_bit, empty, fill_with_zeros, remove, swap)


def files_in(folder: Path) -> list[str]:
    found = (
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.stat().st_size
    )
    return [name for name in found if not name.endswith("lock")]


def spoilt(bench: Bench, folder: Path, below: str = "") -> Iterator[tuple[str, Path]]:
    """Yield copies of a folder, each with a file spoilt, and what was done; many if not all of what can be done."""
    ways = [(name, spoil) for name in files_in(folder) if name.startswith(below) for spoil in SPOIL]
    for number in spread(len(ways), 3 * POINTS):
        name, spoil = ways[number - 1]
        copy = bench.new()
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        before = (copy / name).read_bytes()
        spoil(copy / name)
        if not (copy / name).exists() or (copy / name).read_bytes() != before:
            yield f"{name}: {spoil.__name__}", copy
        shutil.rmtree(copy)


def named(ended: Ended, what: str) -> bool:
    """Whether an error says which file it was: by its name, what it is part of, or what it was swapped with."""
    name, _, how = what.partition(": ")
    words = [Path(name).name, Path(name).stem.partition("_")[0]]
    words += ["no packed checkpoint there"] if name.endswith("eqat.json") else []
    words += [Path(name).suffix] if how == "swap" else []
    return any(word in ended.err for word in words)


def wrong_with(bench: Bench, case: Case, what: str, folder: Path) -> list[str]:
    """Start the command of a spoilt run: it names the file, or all is as undisturbed."""
    ended = bench.run(case, folder)
    if ended.status == 0:
        unlike = [name for name in bench.unlike(case, folder) if not harmless(name)]
        return [f"{case.name}, {what}: silent, {unlike}"] if unlike else []
    if not ended.four_lines:
        return [f"{case.name}, {what}: status {ended.status}, {ended.err[-800:]}"]
    return [] if named(ended, what) else [f"{case.name}, {what}: not named, {ended.err}"]


def harmless(name: str) -> bool:
    """Whether nothing reads a file of a finished run."""
    return name.endswith(("metrics.jsonl", "state.json", "samples.safetensors"))


@pytest.fixture(scope="module")
def killed(bench: Bench) -> Callable[[Case, float], Path]:
    """The folder of a command that was killed on its way; not to be altered."""

    def made(case: Case, part: float) -> Path:
        folder = bench.new()
        ended = bench.run(case, folder, Fault(before_operation=int(part * bench.whole(case)[1].operations)))
        assert ended.status == KILLED
        return folder

    return made


# ---- unfinished runs --------------------------------------------------------------------------------


def test_a_bit_of_a_stream_and_of_a_shard(bench: Bench, tally: Tally, killed: Callable[[Case, float], Path]) -> None:
    folder, failures = killed(STREAMS, 0.62), []
    for file in (next(folder.rglob("*-00001-of-*.safetensors")), min(folder.rglob("fp-*.bin"))):
        copy = bench.new()
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        name = file.relative_to(folder)
        flip_a_bit(copy / name)
        failures += wrong_with(bench, STREAMS, f"{name}: flip_a_bit", copy)
    tally("file of an unfinished run spoilt", 2, failures)


@pytest.mark.faults
@pytest.mark.parametrize("case", [STREAMS, BLOCK_AP["ram", "recompute"], E2E_QP, LLM_QAT, GENERATE_DATA], ids=names)
def test_files_of_unfinished_runs(
    bench: Bench, tally: Tally, killed: Callable[[Case, float], Path], case: Case
) -> None:
    tried, failures = 0, []
    for what, copy in spoilt(bench, killed(case, 0.35 if case is GENERATE_DATA else 0.62)):
        tried += 1
        failures += wrong_with(bench, case, what, copy)
    tally("file of an unfinished run spoilt", tried, failures)


# ---- finished runs ----------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize("case", [RTN, STREAMS, E2E_QP, CONVERSATIONS, LLM_QAT, GENERATE_DATA, LADDERS[0]], ids=names)
def test_files_of_finished_runs(bench: Bench, tally: Tally, case: Case) -> None:
    whole, tried, failures = bench.new(), 0, []
    assert bench.run(case, whole).status == 0
    for what, copy in spoilt(bench, whole, "run/eval" if case in LADDERS else ""):
        tried += 1
        failures += wrong_with(bench, case, what, copy)
    tally("file of a finished run spoilt, its command again", tried, failures)


def evaluated(bench: Bench, model: Path, answer: Path) -> tuple[Ended, Any]:
    tiny: Tiny = bench.place.tiny
    words = ["eval", "--model", str(model), "--device", "cpu", f"--output={answer}"]
    text = [f"--data.source={tiny.text}", "--data.part=held_out", "--data.length=16", "--data.count=4"]
    ended = bench.warm.run([*words, *text])
    found = json.loads(answer.read_text()) if answer.is_file() else {}
    return ended, {name: value for name, value in found.items() if name not in ("model", "provenance", "seconds")}


@pytest.mark.faults
@pytest.mark.parametrize("case", [RTN, LLM_QAT], ids=names)
def test_files_of_checkpoints_that_are_used(bench: Bench, tally: Tally, case: Case) -> None:
    whole, tried, failures = bench.new(), 0, []
    assert bench.run(case, whole).status == 0
    ended, wanted = evaluated(bench, whole / "run" / "model", whole / "answer.json")
    assert ended.status == 0, ended.err
    for what, copy in spoilt(bench, whole, "run/model/"):
        tried += 1
        ended, found = evaluated(bench, copy / "run" / "model", copy / "new-answer.json")
        if ended.status == 0:
            failures += [] if found == wanted else [f"{what}: silent, {found} for {wanted}"]
        elif not ended.four_lines or not named(ended, what):
            failures.append(f"{what}: status {ended.status}, {ended.err[-800:]}")
    tally("file of a checkpoint spoilt, eqat eval", tried, failures)


@pytest.mark.faults
def test_files_of_a_base_that_is_trained_on(bench: Bench, tally: Tally) -> None:
    tried, failures = 0, []
    for what, copy in spoilt(bench, bench.place.base):
        tried += 1
        output = copy.with_name(f"{copy.name}-output")
        words = words_of("e2e-qp", e2e_qp_job(bench.place.tiny, copy, output, max_steps=1))
        ended = bench.warm.run(words)
        if ended.status != 0 and not (ended.four_lines and named(ended, what)):
            failures.append(f"{what}: status {ended.status}, {ended.err[-800:]}")
        if ended.status == 0 and what.partition(":")[0] != "generation_config.json":
            failures.append(f"{what}: silent")
    tally("file of a checkpoint spoilt, eqat e2e-qp", tried, failures)
