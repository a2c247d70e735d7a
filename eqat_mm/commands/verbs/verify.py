"""`eqat verify`: is a checkpoint, or an export of one, what it says? Read again, by nothing that wrote it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from eqat_mm.blocks.config import CONFIG
from eqat_mm.checkpoint.manifest import MANIFEST, checkpoint_folder, read_manifest
from eqat_mm.commands.plumbing.checks import print_checks
from eqat_mm.commands.plumbing.models import model_folder
from eqat_mm.errors import CheckpointError, EqatError
from eqat_mm.export.folder import EXPORT
from eqat_mm.runtime.files import read_json_object
from eqat_mm.runtime.plugins import MODELS, plugged
from eqat_mm.runtime.settings import Settings
from eqat_mm.verify.checkpoint import checkpoint_checks
from eqat_mm.verify.checks import Check
from eqat_mm.verify.exported import export_checks
from eqat_mm.verify.logits import TEXT
from llava_adapters import resolve_alias


@dataclass(frozen=True)
class VerifyJob(Settings):
    """Check a packed checkpoint, or what `eqat export` made of one, down to the bits of its weights.

    Attributes:
        model: folder of the checkpoint or the export, or of the run that made it.
        source: of an export, the checkpoint it was made from. Default: where it was.
        base: full-precision model that is compared with what was not quantized. Default: where it was, if it is here.
        text: file with the text that logits are compared on. Default: three sentences of our own.
        logits: compare logits, too, which takes the memory of a dense model in float32.
        json: print what was found as one JSON object, for scripts.
    """

    model: str
    source: str | None = None
    base: str | None = None
    text: Path | None = None
    logits: bool = True
    json: bool = False

    def check_together(self) -> None:
        """Check that the text is there, before anything is read."""
        if self.text is not None and not self.text.is_file():
            raise CheckpointError("--text", f"no file {self.text}", "a text file", "check the path, or leave it out")


def verify(job: VerifyJob) -> list[Check]:
    """Print a line for every check; return what became of them.

    Raises:
        CheckpointError: it is neither checkpoint nor export; or something is not as it should be.
    """
    folder = _folder(job.model)
    return print_checks(
        folder,
        _checks(job, folder),
        allowed="a folder as it was written, of which every number is what it should be",
        do="copy the folder again, or make it again",
        as_json=job.json,
    )


def _checks(job: VerifyJob, folder: Path) -> Iterable[Check]:
    text = (TEXT if job.text is None else job.text.read_text(encoding="utf-8")) if job.logits else None
    if (folder / EXPORT).is_file():
        named = job.source or _noted_source(folder)
        return export_checks(folder, None if named is None else _found(named, folder, asked=job.source), text)
    base = _base(job.base or read_manifest(folder).source, asked=job.base)
    return checkpoint_checks(folder, base, lambda name: _found(name, folder, asked=None), text)


def _folder(model: str) -> Path:
    """Return the folder of a checkpoint or of an export, itself or in its run."""
    exported = [path for path in (Path(model), Path(model) / "model") if (path / EXPORT).is_file()]
    return exported[0] if exported else model_folder(model)


def _noted_source(folder: Path) -> str | None:
    """Return what the run that made an export was given."""
    with suppress(EqatError, KeyError, TypeError):
        return str(read_json_object(folder.parent / "run.json")["config"]["model"])
    return None


def _found(name: str, folder: Path, *, asked: str | None) -> Path | None:
    """Return the folder of another checkpoint: where it was, or beside the run of this one; None where it is not here.

    Raises:
        CheckpointError: it was asked for, and is none.
    """
    beside = folder.parent.parent / Path(name).name
    for place in (Path(name), beside, beside.parent / Path(name).parent.name):
        with suppress(CheckpointError):
            if (checkpoint_folder(place) / MANIFEST).is_file():
                return checkpoint_folder(place)
    if asked is not None:
        read_manifest(Path(asked))
    return None


def _base(name: str, *, asked: str | None) -> Path | None:
    """Return the folder of a full-precision model; None where it is not on this machine, and was not asked for."""
    resolved = resolve_alias(name)
    cached = None if resolved.count("/") != 1 else try_to_load_from_cache(resolved, CONFIG)
    here = Path(resolved).is_dir() or resolved in plugged(MODELS) or isinstance(cached, str)
    if asked is None and not here:
        return None
    folder = model_folder(resolved)
    return folder if (folder / CONFIG).is_file() else None
