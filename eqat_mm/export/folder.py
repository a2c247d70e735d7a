"""The folder of an exported model: whole or not there, with what comes with the model, and a list of its files."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from eqat_mm.checkpoint.companions import copy_companions
from eqat_mm.checkpoint.manifest import MANIFEST, Manifest
from eqat_mm.checkpoint.unfinished import folder_in_the_making
from eqat_mm.errors import CheckpointError
from eqat_mm.export.card import Facts, write_card
from eqat_mm.export.form import Choices, Format
from eqat_mm.export.opened import PackedModel
from eqat_mm.runtime.files import sha256_of
from eqat_mm.runtime.sealed import read_sealed, write_sealed

EXPORT = "eqat-export.json"
"""Says what an exported folder is: format, source, choices, SHA-256 of every other file. It is written last."""


def write_export(model: PackedModel, form: Format, folder: Path, choices: Choices, facts: Facts) -> None:
    """Write an exported model; it appears whole, in place of one that is there.

    Args:
        model: the checkpoint.
        form: the format.
        folder: of the exported model.
        choices: what a user chose of the format.
        facts: for its card; `usage` comes from the format.
    """
    with folder_in_the_making(folder) as partial:
        copy_companions(model.folder, partial)
        usage = form.write(model, partial, choices)
        write_card(model, partial, replace(facts, usage=usage))
        _seal(model, form, partial, choices, facts)


def _seal(model: PackedModel, form: Format, folder: Path, choices: Choices, facts: Facts) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    entry: dict[str, Any] = {
        "format": form.name,
        "choices": asdict(choices),
        "change": facts.change,
        "source": {MANIFEST: sha256_of(model.folder / MANIFEST), **asdict(model.manifest)},
        "files": {path.relative_to(folder).as_posix(): sha256_of(path) for path in paths},
    }
    write_sealed(folder / EXPORT, entry)


def read_export(folder: Path) -> tuple[dict[str, Any], Manifest]:
    """Return what an exported folder says of itself, and the manifest of its checkpoint; every file is hashed.

    Raises:
        CheckpointError: it is no exported folder, or a file is missing or altered.
    """
    entry = read_sealed(folder / EXPORT, "format", "files", "source")
    for name, digest in entry["files"].items():
        if not (folder / name).is_file() or sha256_of(folder / name) != digest:
            raise CheckpointError(
                where=str(folder / name),
                given="another content than was written" if (folder / name).is_file() else "no such file",
                allowed=f"sha256 {digest[:16]}..., as recorded in {EXPORT}",
                do="copy the folder again, or export it again with --overwrite true",
            )
    return entry, Manifest(**{name: value for name, value in entry["source"].items() if name != MANIFEST})
