"""`eqat export`: a packed checkpoint as the files of another engine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import try_to_load_from_cache

from eqat_mm.checkpoint.folders import load_tokenizer
from eqat_mm.commands.plumbing.models import model_folder, require_model
from eqat_mm.commands.plumbing.runs import asked, model_fingerprint
from eqat_mm.commands.verbs.evaluate import bits_per_weight
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.data.text.windows import text_windows
from eqat_mm.errors import CheckpointError, ConfigError
from eqat_mm.export.card import CARD, Facts, licence_of
from eqat_mm.export.exact import Change, change_of, measured_change, require_exact, require_weights_alone
from eqat_mm.export.folder import EXPORT, read_export, write_export
from eqat_mm.export.form import Choices, Format, FormatName, format_called
from eqat_mm.export.opened import PackedModel, open_packed
from eqat_mm.report import find
from eqat_mm.runtime.files import read_json_object
from eqat_mm.runtime.place import Place
from eqat_mm.runtime.plugins import MODELS, plugged
from eqat_mm.runtime.progress import duration, say, size
from eqat_mm.runtime.run import Run
from eqat_mm.runtime.settings import Settings

_MODEL = "model"


@dataclass(frozen=True)
class ExportJob(Settings):
    """Write a packed checkpoint in the format of another engine: every weight the same, or refused.

    Attributes:
        model: packed checkpoint, or the run that made it, or a hub repository.
        to: gguf (llama.cpp, Ollama), mlx (mlx-lm, mlx-vlm), onnx (onnxruntime-genai) or gptq (gptqmodel, transformers).
        output: run folder; the exported model is `OUTPUT/model`. Default: beside the run, with the format in its name.
        lossy: export also what the format cannot hold exactly; says how many weights differ, and the KL on text.
        data: text that this KL is measured on.
        embedding: GGUF: embedding and head in 8-bit blocks, or as float16.
        evaluations: results of `eqat eval --output` for the card; those in the run's folder and beside it are found.
        overwrite: discard what is already in the output folder.
    """

    model: str
    to: FormatName = field(kw_only=True)
    output: Path | None = None
    lossy: bool = False
    data: TextWindows = field(default_factory=lambda: TextWindows(part="held_out", length=512, count=8))
    embedding: Literal["q8_0", "f16"] = "q8_0"
    evaluations: list[Path] | Path = field(default_factory=list)
    overwrite: bool = False

    def check_together(self) -> None:
        """Check that no choice is in vain."""
        if self.to != "gguf" and self.embedding != "q8_0":
            raise ConfigError(
                where="--embedding",
                given=f"{self.embedding}, with --to {self.to}",
                allowed="with --to gguf; other formats keep embedding and head as they are",
                do="leave it out",
            )


def export(job: ExportJob) -> Path:
    """Export; return the folder of the exported model.

    Raises:
        EqatError: any bad input, or a model that the format does not hold exactly, before anything is written.
    """
    folder, form, choices = model_folder(job.model), format_called(job.to), Choices(job.embedding)
    require_model(folder)
    output = job.output or _default_output(job, folder)
    wanted = asked("export", job, torch.device("cpu"), {"model": folder})
    with Run.open(
        Place.within(output, f"{_MODEL}/{EXPORT}"),
        wanted,
        check=lambda: read_export(output / _MODEL),
        overwrite=job.overwrite,
    ) as run:
        if run.finished:
            say(f"already finished: {output / _MODEL}")
            return output / _MODEL
        model = open_packed(folder)
        facts = _facts(job, model, form, choices)
        run.require_room(form.size(model, choices), f"{form.name} files")
        run.begin()
        write_export(model, form, output / _MODEL, choices, facts)
        run.finish()
        say(_line(output / _MODEL, run.seconds))
    return output / _MODEL


def _default_output(job: ExportJob, folder: Path) -> Path:
    """Return a folder beside the run that made the checkpoint, or beside the checkpoint."""
    run = folder.parent if folder.name == _MODEL else folder
    base = run.parent if Path(job.model).is_dir() else Path("runs")
    return base / f"{run.name if Path(job.model).is_dir() else Path(job.model).name}-{job.to}"


def _facts(job: ExportJob, model: PackedModel, form: Format, choices: Choices) -> Facts:
    """Check that the format holds the model; return what its card says."""
    require_weights_alone(model, form)
    form.refuse(model, choices)
    named = job.evaluations if isinstance(job.evaluations, list) else [job.evaluations]
    quality = _quality(model, named)
    change = change_of(model, form)
    require_exact(model, form, change, lossy=job.lossy)
    bits = bits_per_weight(model.folder)
    assert bits is not None, "a packed checkpoint"
    said = _measured(job, model, form, change) if change.weights else ""
    return Facts(form.name, bits, quality=quality, licence=_licence(model), change=said)


def _measured(job: ExportJob, model: PackedModel, form: Format, change: Change) -> str:
    """Say what a format changes, and what that does on text."""
    job.data.require_source("--data.source")
    windows = text_windows(load_tokenizer(model.folder), job.data)
    found = measured_change(model, form, windows)
    said = f"{change.words} have other values than in the checkpoint: KL {found.kl:.2e} on {found.tokens:,} tokens, "
    said += f"top-1 agreement {found.top1_agreement:.2%}."
    say(said)
    return said


def _quality(model: PackedModel, files: Sequence[Path]) -> list[str]:
    """Return what evaluations have found of the checkpoint, those in files and those beside the run."""
    own = model_fingerprint(model.folder)
    lines = [line for path in files for line in _named(path, own, model.folder)]
    with suppress(CheckpointError):
        for one in find(model.folder.parent, model_fingerprint).measured:
            if one.fingerprint == own:
                lines += _lines(one.numbers)
    return list(dict.fromkeys(lines))


def _named(path: Path, own: str, folder: Path) -> list[str]:
    """Return what an evaluation has found, if it is one of the checkpoint in `folder`, whose fingerprint is `own`."""
    numbers = read_json_object(path)
    if numbers.get("fingerprint") != own:
        raise ConfigError(
            where=f"--evaluations {path}",
            given=f"an evaluation of {numbers.get('model', 'something else')}",
            allowed=f"the result of `eqat eval --model {folder} --output FILE`",
            do="evaluate this checkpoint, or leave it out",
        )
    return _lines(numbers)


def _lines(numbers: dict[str, Any]) -> list[str]:
    tasks = numbers.get("tasks")
    if isinstance(tasks, dict):
        return [f"{name}: {found}" for name, found in tasks.items()]
    names = {"perplexity": "perplexity", "kl": "KL to full precision", "top1_agreement": "top-1 agreement"}
    found = [f"{words} {numbers[name]:.4g}" for name, words in names.items() if isinstance(numbers.get(name), float)]
    return [", ".join(found) + f", on {numbers.get('tokens', 0):,} tokens"]


def _licence(model: PackedModel) -> str | None:
    """Return the licence that the card of the base model names, where it is on this machine."""
    source = model.manifest.source
    if source in plugged(MODELS):
        return licence_of(model_folder(source) / CARD)
    local = Path(source) / CARD
    cached = None if local.is_file() or source.count("/") != 1 else try_to_load_from_cache(source, CARD)
    return licence_of(Path(cached) if isinstance(cached, str) else local)


def _line(folder: Path, seconds: float) -> str:
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"exported: {folder}, {size(total)} ({duration(seconds)})"
