"""`eqat eval` and `eqat generate`: what a model predicts and writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eqat_eval.generation import generate_text
from eqat_eval.perplexity import ReferenceOutputs, evaluate_perplexity
from eqat_mm.blocks.source import WeightSource
from eqat_mm.commands.models import (
    best_device,
    is_packed,
    load_model,
    load_tokenizer,
    model_folder,
    require_model,
)
from eqat_mm.data.windows import TextWindows, text_windows
from eqat_mm.runtime.files import write_json
from eqat_mm.runtime.precision import Precision, autocast, resolve
from eqat_mm.runtime.progress import duration, say


@dataclass(frozen=True)
class EvalJob:
    """Perplexity on held-out text, with KL and top-1 agreement against a reference where one is named.

    Attributes:
        model: packed checkpoint, model folder, alias or hub repository.
        reference: full-precision model to compare the predictions with.
        data: held-out text.
        batch_size: windows per forward.
        precision: of matrix products; `auto` takes bfloat16 where it is faster.
        device: cpu, cuda, cuda:N, or auto.
        output: JSON file for the result.
    """

    model: str = "smollm2-135m"
    reference: str | None = None
    data: TextWindows = field(default_factory=lambda: TextWindows(part="held_out", length=512, count=64))
    batch_size: int = 4
    precision: Precision = "float32"
    device: str = "auto"
    output: Path | None = None


@dataclass(frozen=True)
class GenerateJob:
    """Write text.

    Attributes:
        model: packed checkpoint, model folder, alias or hub repository.
        prompt: text to continue, or to answer with `chat`.
        chat: put the prompt through the model's chat template.
        max_new_tokens: most tokens to write.
        temperature: 0 is greedy.
        top_p: nucleus of the sampling.
        seed: of the sampling.
        device: cpu, cuda, cuda:N, or auto.
    """

    model: str = "smollm2-135m"
    prompt: str = "The capital of France is"
    chat: bool = False
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    device: str = "auto"


def evaluate(job: EvalJob) -> dict[str, Any]:
    """Evaluate a model; print, save and return the result.

    Raises:
        EqatError: any bad input.
    """
    folder = model_folder(job.model)
    require_model(folder)
    device = best_device(job.device)
    windows = text_windows(load_tokenizer(folder), job.data)
    with autocast(resolve(job.precision, device), device):
        reference = None
        if job.reference is not None:
            full = load_model(model_folder(job.reference), device)
            reference = ReferenceOutputs.record(full, windows, job.batch_size)
            del full
        model = load_model(folder, device)
        found = evaluate_perplexity(model, windows, batch_size=job.batch_size, reference=reference)
    result = {"model": job.model, "bits_per_weight": bits_per_weight(folder), **found.as_dict()}
    if job.output is not None:
        write_json(job.output, result)
    say(_line(result))
    return result


def generate(job: GenerateJob) -> str:
    """Generate text, streamed to standard output.

    Raises:
        EqatError: any bad input.
    """
    folder = model_folder(job.model)
    require_model(folder)
    model, tokenizer = load_model(folder, best_device(job.device)), load_tokenizer(folder)
    written = generate_text(
        model,
        tokenizer,
        job.prompt,
        job.max_new_tokens,
        temperature=job.temperature,
        top_p=job.top_p,
        seed=job.seed,
        chat=job.chat,
        stream=True,
    )
    say(f"[{written.tokens} tokens, {written.tokens_per_second:.1f} tokens/s]")
    return written.text


def bits_per_weight(folder: Path) -> float | None:
    """Stored bits per quantized weight, step sizes and zero points included; None for full precision."""
    if not is_packed(folder):
        return None
    source = WeightSource(folder)
    stored = weights = 0
    for name in source.names():
        if name.endswith((".weight_packed", ".weight_scale", ".weight_zero_point")):
            stored += source.read(name).nbytes * 8
        elif name.endswith(".weight_shape"):
            weights += int(source.read(name).prod())
    return stored / weights


def _line(result: dict[str, Any]) -> str:
    text = f"perplexity {result['perplexity']:.3f} on {result['tokens']:,} tokens"
    if result["kl"] is not None:
        text += f", KL {result['kl']:.4f}, top-1 agreement {result['top1_agreement']:.1%}"
    return f"{result['model']}: {text} ({duration(result['seconds'])})"
