"""Where a checkpoint is put: under a temporary name first, then in the place of another one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eqat_mm.blocks.source import INDEX
from eqat_mm.checkpoint.companions import files_like
from eqat_mm.checkpoint.manifest import MANIFEST, read_manifest
from eqat_mm.errors import CheckpointError
from eqat_mm.runtime.files import fsync


@contextmanager
def folder_in_the_making(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; on success it replaces `folder`, on any exception it is removed."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_place(folder: Path) -> None:
    """Check that no model is in the folder but a packed checkpoint, whose files are replaced.

    Raises:
        CheckpointError: there is one.
    """
    others = files_like(folder, ["*.safetensors", "*.bin", INDEX])
    if others and not (folder / MANIFEST).is_file():
        raise CheckpointError(
            where=str(folder),
            given=f"{others[0]}, of a model that is no packed checkpoint",
            allowed="a new folder, or one that holds a packed checkpoint",
            do="save to another folder, or remove that model first",
        )


def replace_files(folder: Path, partial: Path) -> None:
    """Move a whole checkpoint into a folder, in place of the one there; the manifest goes first and comes last."""
    old = read_manifest(folder).files if (folder / MANIFEST).is_file() else {}
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in old:
        (folder / name).unlink(missing_ok=True)
    paths = [path.relative_to(partial) for path in sorted(partial.rglob("*")) if path.is_file()]
    for path in sorted(paths, key=lambda path: path.name == MANIFEST):
        (folder / path).parent.mkdir(exist_ok=True)
        (partial / path).replace(folder / path)
    fsync(folder)
