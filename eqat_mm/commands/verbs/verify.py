"""`eqat verify`: is a checkpoint whole and unaltered, file by file?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from eqat_mm.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from eqat_mm.checkpoint.verify import require_listed, what_is_wrong
from eqat_mm.commands.plumbing.models import model_folder
from eqat_mm.errors import CheckpointError
from eqat_mm.runtime.progress import progress, say
from eqat_mm.runtime.settings import Settings

_AS_WRITTEN = "as written"


@dataclass(frozen=True)
class VerifyJob(Settings):
    """Check a packed checkpoint, every file of it.

    Attributes:
        model: folder of the checkpoint, or of the run that made it.
    """

    model: str = field(kw_only=True)


def verify(job: VerifyJob) -> Manifest:
    """Print what became of every file of a checkpoint; return its manifest.

    Raises:
        CheckpointError: it is no packed checkpoint; or a file is missing, altered or not in the manifest.
    """
    folder = model_folder(job.model)
    manifest = read_manifest(folder)
    say(f"{MANIFEST}: {_AS_WRITTEN if manifest.unnoticed is None else 'of an older version, without its own hash'}")
    wrong = list(_said(folder, manifest))
    if wrong:
        raise wrong[0]
    require_listed(folder, manifest)
    say(f"{folder}: whole, {len(manifest.files) + 1} files")
    return manifest


def _said(folder: Path, manifest: Manifest) -> Iterator[CheckpointError]:
    """Say of each file whether it is as it was written; yield what is wrong."""
    for name in progress(manifest.files, what="verify", total=len(manifest.files), unit="file"):
        error = what_is_wrong(folder / name, manifest.files[name])
        say(f"{name}: {_AS_WRITTEN if error is None else 'altered' if (folder / name).is_file() else 'missing'}")
        if error is not None:
            yield error
