"""What every reader makes of every kind of folder: `python -m tests.readers.survey [WORD ...]`.

A case is a model, a spec and a reader. The folder is made by the commands, the reader answers from its own process, and
its answer is compared with ours in float32. What was seen goes into `docs/readers.json`, and from there into
`docs/formats.md`. Without words all cases are asked about that are not there yet.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eqat_mm.errors import EqatError
from tests.readers import cases, table
from tests.readers.cases import READERS, Case, Reader
from tests.readers.environments import command
from tests.readers.jobs import NEW
from tests.readers.table import ABSENT, Seen

HERE = Path(__file__).parent
SECONDS = 1200
"""Longest that a reader may take for a folder."""

TIE = math.log(1.25)
"""Nats: a token that we find nearly as likely as our first choice is as good; rounding decides between the two."""

ELSEWHERE = {
    "vLLM 0.33 on a GPU": "no GPU; its chooser and loaders were run without one, see below",
    "SGLang 0.5.23": "no GPU; its source was read, see below",
}
"""Readers that nobody asked, and why."""

Answer = dict[str, Tensor] | str
"""What a reader answers, or why it does not."""


def seen(name: str, wanted: Sequence[Case]) -> Iterator[Seen]:
    """Yield what becomes of cases of one reader."""
    folders: dict[Case, Path] = {}
    for case in wanted:
        try:
            folders[case] = cases.folder_of(*case[:2], READERS[name].format)
        except EqatError as error:
            yield Seen(*case, f"eqat export: {error.given}")
    with tempfile.TemporaryDirectory() as scratch:
        for case, answer in _answers(READERS[name], folders, Path(scratch)):
            yield Seen(*case, answer) if isinstance(answer, str) else Seen(*case, **_compared(*case[:2], answer))


def _answers(reader: Reader, folders: dict[Case, Path], scratch: Path) -> Iterator[tuple[Case, Answer]]:
    """Ask a reader about folders, in one process unless that dies."""
    try:
        command(reader.environment, HERE)
    except EqatError as error:
        yield from ((case, ABSENT + error.given.splitlines()[-1]) for case in folders)
        return
    if reader.program == "llama_cpp.py":
        yield from ((case, _of_llama_cpp(reader, folder, case[0], scratch)) for case, folder in folders.items())
        return
    todo = [
        (case, _job(reader, case, folder, scratch / str(number)))
        for number, (case, folder) in enumerate(folders.items())
    ]
    while todo:
        (scratch / "jobs.json").write_text(json.dumps([job for _, job in todo]))
        with _started(reader, scratch) as process:
            while todo:
                case, job = todo.pop(0)
                answer = _awaited(Path(job["outputs"]), process)
                yield case, _why(process, scratch) if answer is None else answer
                if answer is None:
                    break  # the next ones are for a new process


def _job(reader: Reader, case: Case, folder: Path, scratch: Path) -> dict[str, Any]:
    """Return what a reader is asked, in files."""
    scratch.mkdir()
    inputs = cases.asked(case[0])
    save_file(inputs, scratch / "inputs")
    job: dict[str, Any] = {
        "folder": str(folder),
        "inputs": str(scratch / "inputs"),
        "outputs": str(scratch / "outputs"),
    }
    if reader.program == "read_transformers.py" and case[0] == cases.SEEING_MODEL:
        job["save"] = True
    if reader.program == "read_mlx.py":
        job["end"] = cases.ending(case[0])
    if reader.program == "read_vllm.py" and "pixel_values" in inputs:
        cases.picture().save(scratch / "image.png")
        job |= {"image": str(scratch / "image.png"), "question": cases.question(folder)}
    return job


def _answer(outputs: Path) -> Answer | None:
    """Return what stands in the files of an answer; None where there are none."""
    error = Path(f"{outputs}.error")
    if error.is_file():
        return table.reason_in([line.strip() for line in error.read_text().splitlines() if line.strip()])
    return load_file(outputs) if outputs.is_file() else None


@contextmanager
def _started(reader: Reader, scratch: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a reader on its jobs; it ends behind the body."""
    line, variables = command(reader.environment, HERE / reader.program, str(scratch / "jobs.json"), *reader.words)
    with (scratch / "said").open("wb") as said:
        process = subprocess.Popen(line, stdout=said, stderr=said, env=variables, cwd=scratch)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _awaited(outputs: Path, process: subprocess.Popen[bytes]) -> Answer | None:
    """Wait for an answer; None where the reader ends without one, or takes too long."""
    began = time.monotonic()
    while time.monotonic() - began < SECONDS:
        ended = process.poll() is not None
        answer = _answer(outputs)
        if answer is not None or ended:
            return answer
        time.sleep(0.2)
    return None


def _why(process: subprocess.Popen[bytes], scratch: Path) -> str:
    """Return why a reader gave no answer."""
    if process.poll() is None:
        return f"no answer in {SECONDS} seconds"
    said = [each.strip() for each in (scratch / "said").read_text(errors="replace").splitlines() if each.strip()]
    return table.reason_in(said) or f"exit status {process.returncode}"


def _of_llama_cpp(reader: Reader, folder: Path, model: str, scratch: Path) -> Answer:
    rows, begin = cases.asked(model)["input_ids"].tolist(), cases.prompt(model).tolist()
    (scratch / "request.json").write_text(json.dumps({"windows": rows, "prompts": [begin], "tokens": NEW}))
    (file,) = (path for path in folder.glob("*.gguf") if "mmproj" not in path.name)
    wrong = _run(reader, [str(file), str(scratch / "request.json"), str(scratch / "answer.npz")], SECONDS)
    if wrong:
        return wrong
    answer = np.load(scratch / "answer.npz")
    (written,) = json.loads(str(answer["said"]))["written"]
    return {"logits": torch.from_numpy(answer["logits"]), "generated": torch.tensor(written)}


def _run(reader: Reader, words: list[str], seconds: int) -> str:
    """Run a reader; return why it failed, nothing where it did not."""
    line, variables = command(reader.environment, HERE / reader.program, *words)
    try:
        done = subprocess.run(
            line, check=False, capture_output=True, text=True, env=variables, timeout=seconds, cwd=Path(words[0]).parent
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {seconds} seconds"
    said = [each.strip() for each in done.stderr.splitlines() if each.strip()]
    return "" if done.returncode == 0 else table.reason_in(said) or f"exit status {done.returncode}"


def _compared(model: str, spec: str, theirs: dict[str, Tensor]) -> dict[str, Any]:
    ids, found = cases.asked(model)["input_ids"], cases.logprobs(model, spec)
    result = _written(model, spec, theirs) | {"ours": _perplexity(found, ids)}
    if "logits" in theirs:
        given = theirs["logits"].float().log_softmax(-1)
        result["kl"] = float((found.exp() * (found - given)).sum(-1).mean())
        result["agreement"] = float((found.argmax(-1) == given.argmax(-1)).float().mean())
        result["perplexity"] = _perplexity(given, ids)
    elif "logprobs" in theirs:
        result["agreement"] = float((found[:, :-1].argmax(-1) == theirs["likeliest"]).float().mean())
        result["perplexity"] = float((-theirs["logprobs"].mean()).exp())
    if "reloaded" in theirs:
        result["reloaded"] = float(theirs["reloaded"] / found.abs().max())
    return result


def _written(model: str, spec: str, theirs: dict[str, Tensor]) -> dict[str, Any]:
    """Compare a text with what we would write in the place of each of its tokens."""
    ends = (theirs["generated"] == cases.ending(model)).nonzero().flatten().tolist()
    written = theirs["generated"][: ends[0] + 1 if ends else None].long()
    found = cases.behind(model, spec, written)
    own = found.gather(-1, written[:, None])[:, 0]
    result = {"written": int((found.max(-1).values - own < TIE).sum()), "tokens": len(written)}
    if "chosen" in theirs:
        return result | {"apart": float((theirs["chosen"][: len(written)] - own).abs().max())}
    return result


def _perplexity(logprobs: Tensor, ids: Tensor) -> float:
    return float((-logprobs[:, :-1].gather(-1, ids[:, 1:, None]).mean()).exp())


def main(wanted: list[str]) -> None:
    """Ask about cases that have all of these words, or all that are missing; write what was seen."""
    there = set() if wanted else {one.key for one in table.read()}
    chosen = [case for case in cases.cases() if all(word in case[:2] or word in case[2] for word in wanted)]
    chosen = [case for case in chosen if " ".join(case) not in there]
    for name, group in itertools.groupby(chosen, key=lambda case: case[2]):
        for one in seen(name, list(group)):
            print(f"{one.key}: {table.cell(one)} {one}", flush=True)
            table.keep(one)
    if not wanted:
        for name, spec in itertools.product(ELSEWHERE, cases.SPECS):
            table.keep(Seen(cases.TEXT_MODEL, spec, name, ABSENT + ELSEWHERE[name]))


if __name__ == "__main__":
    main(sys.argv[1:])
