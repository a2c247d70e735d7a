"""Everything that is checked of an exported folder, against the checkpoint it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eqat_mm.checkpoint.build import skeleton
from eqat_mm.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from eqat_mm.checkpoint.source import packed_names
from eqat_mm.export.folder import EXPORT
from eqat_mm.runtime.files import sha256_of
from eqat_mm.runtime.progress import progress
from eqat_mm.runtime.sealed import read_sealed
from eqat_mm.verify.checks import Check, judged, not_looked_at, tried
from eqat_mm.verify.files import file_checks
from eqat_mm.verify.formats.part import READERS, Part, reader_of
from eqat_mm.verify.logits import in_model, logits_check
from eqat_mm.verify.packed import Opened, opened
from eqat_mm.verify.slabs import Array


def export_checks(folder: Path, source: Path | None, text: str | None) -> Iterator[Check]:
    """Yield what becomes of each check of an exported folder.

    Args:
        folder: exported.
        source: the packed checkpoint; None where it is not here.
        text: to compare logits on; None leaves them out.

    Raises:
        CheckpointError: its list of files was altered.
    """
    entry = read_sealed(folder / EXPORT, "format", "files", "source")
    form, lossy = entry["format"], bool(entry.get("change"))
    yield Check("export", True, f"{form}, {'lossy: ' + entry['change'] if lossy else 'exact'}")
    yield from tried("files", lambda: list(file_checks(folder, entry["files"], EXPORT)))
    if source is None or form not in READERS:
        why = "the checkpoint is not here: name it with --source" if source is None else f"no reader of {form}"
        yield not_looked_at("weights", why)
        return
    same = tried("source", lambda: _source(source, entry))
    yield from same
    if same[0].passed:
        yield from _against(folder, source, form, text, lossy=lossy)


def _source(source: Path, entry: dict[str, Any]) -> Check:
    wrong = [] if sha256_of(source / MANIFEST) == entry["source"][MANIFEST] else [f"{source} is another checkpoint"]
    return judged("source", wrong, f"{source}, as it was exported")


def _against(folder: Path, source: Path, form: str, text: str | None, *, lossy: bool) -> Iterator[Check]:
    manifest, one = read_manifest(source), opened(source)
    found = _Compared(one, packed_names(skeleton(source, manifest)))
    read = tried("weights", lambda: found.checks(reader_of(form)(folder), form, lossy=lossy))
    yield from read
    if text is None or not all(check.passed for check in read):
        yield not_looked_at("logits", "left out" if text is None else "the weights differ")
        return

    def look() -> Check:
        return logits_check(one, manifest, _linears(folder, form, one, manifest), text, exact=not lossy)

    yield from tried("logits", look)


def _linears(folder: Path, form: str, one: Opened, manifest: Manifest) -> Iterator[tuple[str, Array]]:
    """Yield the dense weights of the quantized linears as the format has them, by their names in the model."""
    rename, name = packed_names(skeleton(one.folder, manifest)), in_model(one, manifest)
    wanted = {name(linear) for linear in one.linears}
    for part in reader_of(form)(folder):
        linear = rename(part.name).removesuffix(".weight")
        if linear in wanted:
            yield linear, part.values


class _Compared:
    """Tensors of an export against those of its checkpoint, one at a time.

    Args:
        one: the checkpoint.
        rename: from a name in files to the name in the model.
    """

    def __init__(self, one: Opened, rename: Callable[[str], str]) -> None:
        self.one = one
        self.rename = rename
        self.linears = {rename(f"{linear}.weight_scale").removesuffix("_scale"): linear for linear in one.linears}
        packed = tuple(f"{linear}.weight" for linear in one.linears)
        self.others = {rename(name): name for name in one.slabs if not name.startswith(packed)}

    def checks(self, parts: Iterator[Part], form: str, *, lossy: bool) -> list[Check]:
        """Return whether all weights are there, and the same."""
        seen: set[str] = set()
        wrong: dict[str, list[str]] = {"weights": [], "others": []}
        differ = total = 0
        for part in progress(parts, what=f"compare with {form}", total=len(self.linears) + len(self.others)):
            name = self.rename(part.name)
            seen.add(name)
            ours, what = self._ours(name)
            if ours is None or ours.shape != part.values.shape:
                wrong[what].append(f"{part.name} {list(part.values.shape)} is not of the checkpoint")
                continue
            off = ~(np.abs(part.values - ours) <= part.slack)
            total += off.size if what == "weights" else 0
            if off.any() and not (lossy and what == "weights"):
                row = int(np.argwhere(off)[0][0])
                wrong[what].append(f"{part.name}: {int(off.sum())} of {off.size} values differ, the first in row {row}")
            differ += int(off.sum()) if what == "weights" else 0
        for what, names in (("weights", self.linears), ("others", self.others)):
            wrong[what] += [f"{name} is missing" for name in names if name not in seen and not self._spare(name)]
        share = f", {differ:,} of {total:,} weights with other values" if lossy else ", every weight the same"
        return [
            judged("weights", wrong["weights"], f"{len(self.linears)} linears, read by {form}{share}"),
            judged(
                "others",
                wrong["others"],
                f"{len(self.others)} not quantized, each as near as {form} holds it",
            ),
        ]

    def _ours(self, name: str) -> tuple[Array | None, str]:
        if name in self.linears:
            return self.one.held(self.linears[name]).weight(), "weights"
        return (self.one.slabs[self.others[name]].numbers() if name in self.others else None), "others"

    def _spare(self, name: str) -> bool:
        """Whether a tensor may be missing: a head that is the embedding, or what is in a file for images."""
        return name == "lm_head.weight" or any(part in name for part in ("vision_tower", "projector", "image_newline"))
