"""What every reader makes of every kind of folder: `python -m tests.readers.survey [WORD ...]`.

A case is a model, a spec and a reader. The folder is made by the commands, the reader answers from its own process,
and its answer is compared with ours in float32. What was seen goes into `docs/readers.json`, and from there into
`docs/formats.md`.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import eqat_mm
from eqat_eval.prompts import encode_prompt
from eqat_mm.checkpoint.folders import load_tokenizer, takes_images
from eqat_mm.checkpoint.speaker import load_speaker
from eqat_mm.commands.verbs.export import ExportJob, export
from eqat_mm.commands.verbs.quantize import RTNJob, rtn
from eqat_mm.data.image_text.prompt import Renderer
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.data.text.windows import text_windows
from eqat_mm.errors import EqatError
from eqat_mm.quant.spec import QuantSpec
from tests.readers import table
from tests.readers.environments import command, root
from tests.readers.table import Seen

HERE = Path(__file__).parent
TEXT_MODEL, SEEING_MODEL = "smollm2-135m", "demo-llava"
SPECS = {
    f"w{bits}g64{'sym' * symmetric}": QuantSpec(bits, 64, symmetric)
    for bits, symmetric in itertools.product((2, 3, 4), (False, True))
}
TEXT = TextWindows("demo-wikipedia", part="held_out", length=128, count=2)
QUESTION = "What shape is in the image?"
PROMPT, NEW = 24, 8
SAVED = ("w4g64", "w2g64sym")
"""Specs at which transformers saves the model, and reads that again."""

SECONDS = 900
"""Longest that a reader may take."""


@dataclass(frozen=True)
class Reader:
    """One engine in one environment.

    Attributes:
        environment: name of it.
        program: that reads.
        format: of the folders it reads: our own, or what `eqat export` calls it.
        sees: whether it is asked about images, too.
    """

    environment: str
    program: str
    format: str = "checkpoint"
    sees: bool = False


READERS = {
    **{
        f"transformers 5.23, compressed-tensors {library}": Reader(
            f"transformers-5-ct-{library}", "read_transformers.py", sees=True
        )
        for library in ("0.17", "0.18", "0.19", "0.20")
    },
    **{
        f"transformers 4.57, compressed-tensors {library}": Reader(
            f"transformers-4.57-ct-{library}", "read_transformers.py", sees=True
        )
        for library in ("0.12", "0.15", "0.16", "0.18", "0.20")
    },
    "vLLM 0.32 on a CPU": Reader("vllm", "read_vllm.py", sees=True),
    "llama.cpp 0.5.0": Reader("llama.cpp", "llama_cpp.py", "gguf"),
    "mlx-lm 0.32.2, mlx-vlm 0.7.10": Reader("mlx", "read_mlx.py", "mlx", sees=True),
    "ONNX Runtime 1.32": Reader("onnxruntime", "read_onnx.py", "onnx"),
    "gptqmodel 7.7": Reader("gptqmodel", "read_gptq.py", "gptq"),
}
"""What is asked, by the name it has in the table."""


def cases() -> Iterator[tuple[str, str, str]]:
    """Yield model, spec and reader of every case."""
    yield from itertools.product([TEXT_MODEL], SPECS, READERS)
    seeing = [name for name, reader in READERS.items() if reader.sees]
    yield from itertools.product([SEEING_MODEL], ("w2g64sym", "w4g64"), seeing)


@cache
def folder_of(model: str, spec: str, form: str) -> Path:
    """Return a folder of a model, made where it is not there yet.

    Raises:
        EqatError: the format does not hold it.
    """
    place = root() / "folders" / f"{model}-{spec}"
    made = rtn(RTNJob(model=model, output=place / "rtn", quant=SPECS[spec]))
    if form == "checkpoint":
        return made
    job: dict[str, Any] = {"model": str(made.parent), "to": form, "output": place / form}
    try:
        return export(ExportJob(**job))
    except EqatError:
        return export(ExportJob(**job, lossy=True, data=TEXT))


@cache
def asked(model: str) -> dict[str, Tensor]:
    """Return what a model is asked: windows of real text, or a question about an image."""
    folder = folder_of(model, "w4g64", "checkpoint")
    if not takes_images(folder):
        return {"input_ids": text_windows(load_tokenizer(folder), TEXT)}
    inputs = encode_prompt(load_speaker(folder), QUESTION, [picture()], chat=True)
    return {name: value.contiguous() for name, value in inputs.items()}


def picture() -> Any:
    """Return an image: a red rectangle on green."""
    from PIL import Image

    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[..., 1], pixels[16:48, 12:52] = 150, (220, 30, 20)
    return Image.fromarray(pixels)


@cache
@torch.no_grad()
def ours(model: str, spec: str) -> dict[str, Tensor]:
    """Return what we make of it, in float32."""
    loaded: Any = eqat_mm.load(folder_of(model, spec, "checkpoint"), dtype=torch.float32)
    given = asked(model)
    images = {name: value for name, value in given.items() if name != "input_ids"}
    rows = given["input_ids"].split(1)
    prompt = rows[0] if images else rows[0][:, :PROMPT]
    written = loaded.generate(input_ids=prompt, **images, max_new_tokens=NEW, do_sample=False)
    logits = torch.cat([loaded(input_ids=row, **images).logits for row in rows])
    return {"logits": logits, "generated": written[0], "prompt": prompt[0]}


def seen(model: str, spec: str, name: str) -> Seen:
    """Return what became of a case."""
    reader = READERS[name]
    try:
        folder = folder_of(model, spec, reader.format)
    except EqatError as error:
        return Seen(model, spec, name, f"eqat export: {error.given}")
    with tempfile.TemporaryDirectory() as scratch:
        theirs = _answered(reader, folder, asked(model), Path(scratch))
    if isinstance(theirs, str):
        return Seen(model, spec, name, theirs)
    return Seen(model, spec, name, **_compared(asked(model)["input_ids"], ours(model, spec), theirs))


def _answered(reader: Reader, folder: Path, inputs: dict[str, Tensor], scratch: Path) -> dict[str, Tensor] | str:
    """Return what a reader answers, or why it does not."""
    if reader.program == "llama_cpp.py":
        return _of_llama_cpp(reader, folder, inputs, scratch)
    save_file(inputs, scratch / "inputs")
    more = ["save"] if reader.program == "read_transformers.py" and folder.parent.parent.name.endswith(SAVED) else []
    if "pixel_values" in inputs and reader.program == "read_vllm.py":
        more = _about_an_image(folder, scratch)
    words = [str(folder), str(scratch / "inputs"), str(scratch / "outputs"), *more]
    return _run(reader, words) or load_file(scratch / "outputs")


def _about_an_image(folder: Path, scratch: Path) -> list[str]:
    """Return an image and a question as engines take them that have the processor themselves."""
    renderer = Renderer(load_speaker(folder))
    picture().save(scratch / "image.png")
    return [str(scratch / "image.png"), renderer.text([renderer.asked(QUESTION, 1)], answering=True)]


def _of_llama_cpp(reader: Reader, folder: Path, inputs: dict[str, Tensor], scratch: Path) -> dict[str, Tensor] | str:
    rows = inputs["input_ids"].tolist()
    request = {"windows": rows, "prompts": [rows[0][:PROMPT]], "tokens": NEW}
    (scratch / "request.json").write_text(json.dumps(request))
    (file,) = (path for path in folder.glob("*.gguf") if "mmproj" not in path.name)
    wrong = _run(reader, [str(file), str(scratch / "request.json"), str(scratch / "answer.npz")])
    if wrong:
        return wrong
    answer = np.load(scratch / "answer.npz")
    (written,) = json.loads(str(answer["said"]))["written"]
    return {"logits": torch.from_numpy(answer["logits"]), "generated": torch.tensor(rows[0][:PROMPT] + written)}


def _run(reader: Reader, words: list[str]) -> str:
    """Run a reader; return why it failed, nothing where it did not."""
    line, variables = command(reader.environment, HERE / reader.program, *words)
    try:
        done = subprocess.run(
            line, check=False, capture_output=True, text=True, env=variables, timeout=SECONDS, cwd=Path(words[0]).parent
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {SECONDS} seconds"
    said = [each.strip() for each in done.stderr.splitlines() if each.strip()]
    return "" if done.returncode == 0 else table.reason_in(said) or f"exit status {done.returncode}"


def _compared(ids: Tensor, mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Any]:
    found = mine["logits"].log_softmax(-1)
    prompt = mine["prompt"].tolist()
    new, written = mine["generated"].tolist()[len(prompt) :], theirs["generated"].tolist()
    written = written[len(prompt) :] if written[: len(prompt)] == prompt else written  # some give what is new alone
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(new, written, strict=False))
    result: dict[str, Any] = {
        "written": NEW if new == written[: len(new)] else len(list(same)),
        "ours": _perplexity(found, ids),
    }
    if "logits" in theirs:
        given = theirs["logits"].float().log_softmax(-1)
        result["kl"] = float((found.exp() * (found - given)).sum(-1).mean())
        result["agreement"] = float((found.argmax(-1) == given.argmax(-1)).float().mean())
        result["perplexity"] = _perplexity(given, ids)
    elif "logprobs" in theirs:
        result["agreement"] = float((found[:, :-1].argmax(-1) == theirs["likeliest"]).float().mean())
        result["perplexity"] = float((-theirs["logprobs"].mean()).exp())
    if "reloaded" in theirs:
        result["reloaded"] = float(theirs["reloaded"] / mine["logits"].abs().max())
    return result


def _perplexity(logprobs: Tensor, ids: Tensor) -> float:
    return float((-logprobs[:, :-1].gather(-1, ids[:, 1:, None]).mean()).exp())


def main(wanted: list[str]) -> None:
    """Ask about all cases, or those with all of these words in model, spec and reader, and write what was seen."""
    for model, spec, name in cases():
        if all(word in (model, spec) or word in name for word in wanted):
            one = seen(model, spec, name)
            print(f"{model} {spec} {name}: {table.cell(one)} {one}", flush=True)
            table.keep(one)


if __name__ == "__main__":
    main(sys.argv[1:])
