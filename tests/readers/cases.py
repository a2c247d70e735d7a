"""What readers are asked about: models, specs and folders, made by the commands, and what we make of them ourselves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import eqat_mm
from eqat_eval.prompts import encode_prompt
from eqat_mm.checkpoint.folders import load_tokenizer, takes_images
from eqat_mm.checkpoint.manifest import MANIFEST
from eqat_mm.checkpoint.speaker import load_speaker
from eqat_mm.commands.verbs.export import ExportJob, export
from eqat_mm.commands.verbs.quantize import RTNJob, rtn
from eqat_mm.data.image_text.prompt import Renderer
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.data.text.windows import text_windows
from eqat_mm.errors import ExportError
from eqat_mm.export.folder import EXPORT
from eqat_mm.quant.spec import QuantSpec
from tests.readers.environments import root
from tests.readers.jobs import PROMPT

TEXT_MODEL, SEEING_MODEL = "smollm2-135m", "demo-llava"
SPECS = {
    f"w{bits}g64{'sym' * symmetric}": QuantSpec(bits, 64, symmetric)
    for bits, symmetric in itertools.product((2, 3, 4), (False, True))
}
SEEN_SPECS = ("w2g64sym", "w4g64", "w4g64sym")
"""Of the model that sees."""

TEXT = TextWindows("demo-wikipedia", part="held_out", length=64, count=2)
QUESTION = "What shape is in the image?"


@dataclass(frozen=True)
class Reader:
    """One engine in one environment.

    Attributes:
        environment: name of it.
        program: that reads.
        format: of the folders it reads: our own, or what `eqat export` calls it.
        sees: whether it is asked about images, too.
        words: behind the program.
    """

    environment: str
    program: str
    format: str = "checkpoint"
    sees: bool = False
    words: tuple[str, ...] = ()


READERS = {
    **{
        f"transformers {release}, compressed-tensors {library}": Reader(
            f"transformers-{environment}-ct-{library}", "read_transformers.py", sees=True
        )
        for release, environment, libraries in (
            ("5.23", "5", ("0.17", "0.18", "0.19", "0.20")),
            ("4.57", "4.57", ("0.12", "0.15", "0.16", "0.18", "0.20")),
        )
        for library in libraries
    },
    "vLLM 0.32 on a CPU": Reader("vllm", "read_vllm.py", sees=True),
    "llama.cpp 0.5.0": Reader("llama.cpp", "llama_cpp.py", "gguf"),
    "mlx-lm 0.32.2, mlx-vlm 0.7.10": Reader("mlx", "read_mlx.py", "mlx", sees=True),
    "ONNX Runtime 1.32": Reader("onnxruntime", "read_onnx.py", "onnx"),
    "gptqmodel 7.7": Reader("gptqmodel", "read_gptq.py", "gptq", sees=True),
    "transformers 5.23, gptqmodel 7.7": Reader("gptqmodel", "read_gptq.py", "gptq", True, ("transformers",)),
}
"""What is asked, by the name it has in the table."""

Case = tuple[str, str, str]
"""Model, spec and reader."""


def cases() -> Iterator[Case]:
    """Yield all cases, reader by reader."""
    for name, reader in READERS.items():
        yield from itertools.product([TEXT_MODEL], SPECS, [name])
        yield from itertools.product([SEEING_MODEL] if reader.sees else [], SEEN_SPECS, [name])


@cache
def folder_of(model: str, spec: str, form: str) -> Path:
    """Return a folder of a model, made where it is not there yet; the last of its files says that it is whole.

    Raises:
        ExportError: the format does not hold it.
    """
    place = root() / "folders" / f"{model}-{spec}"
    if form == "checkpoint":
        made = place / "rtn" / "model"
        return made if (made / MANIFEST).is_file() else rtn(RTNJob(model, place / "rtn", SPECS[spec]))
    if (place / form / "model" / EXPORT).is_file():
        return place / form / "model"
    made = folder_of(model, spec, "checkpoint")
    job: dict[str, Any] = {"model": str(made), "to": form, "output": place / form, "overwrite": True}
    try:
        return export(ExportJob(**job))
    except ExportError:
        return export(ExportJob(**job, lossy=True, data=TEXT))


@cache
def asked(model: str) -> dict[str, Tensor]:
    """Return what a model is asked: windows of real text, or a question about an image."""
    folder = folder_of(model, "w4g64", "checkpoint")
    if not takes_images(folder):
        return {"input_ids": text_windows(load_tokenizer(folder), TEXT)}
    inputs = encode_prompt(load_speaker(folder), QUESTION, [picture()], chat=True)
    return {name: value.contiguous() for name, value in inputs.items()}


def prompt(model: str) -> Tensor:
    """Return the ids [T] that a reader continues: the question, or the beginning of the first text."""
    (first, *_) = asked(model)["input_ids"]
    return first if "pixel_values" in asked(model) else first[:PROMPT]


def question(folder: Path) -> str:
    """Return the question as engines take it that have the processor themselves."""
    renderer = Renderer(load_speaker(folder))
    return renderer.text([renderer.asked(QUESTION, 1)], answering=True)


def picture() -> Image.Image:
    """Return an image: a red rectangle on green."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[..., 1], pixels[16:48, 12:52] = 150, (220, 30, 20)
    return Image.fromarray(pixels)


@cache
def logprobs(model: str, spec: str) -> Tensor:
    """Return our log probabilities of the next token behind every one of what is asked, float32 [B, T, V]."""
    given = dict(asked(model))
    return torch.cat([_predicted(model, spec, row) for row in given.pop("input_ids").split(1)])


def behind(model: str, spec: str, written: Tensor) -> Tensor:
    """Return our log probabilities of each token that a reader wrote, and of the others in its place, [T, V]."""
    begin = prompt(model)
    predicted = _predicted(model, spec, torch.cat([begin, written])[None])[0]
    return predicted[len(begin) - 1 : -1]


def ending(model: str) -> int:
    """Return the token that ends a text."""
    return int(load_tokenizer(folder_of(model, "w4g64", "checkpoint")).eos_token_id)


@torch.no_grad()
def _predicted(model: str, spec: str, row: Tensor) -> Tensor:
    images = {name: value for name, value in asked(model).items() if name not in ("input_ids", "attention_mask")}
    predicted: Tensor = _loaded(model, spec)(input_ids=row, **images).logits.log_softmax(-1)
    return predicted


@lru_cache(maxsize=1)
def _loaded(model: str, spec: str) -> Any:
    return eqat_mm.load(folder_of(model, spec, "checkpoint"), dtype=torch.float32)
