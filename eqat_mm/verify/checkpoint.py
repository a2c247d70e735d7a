"""Everything that is checked of a packed checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from eqat_mm.checkpoint.build import skeleton
from eqat_mm.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from eqat_mm.checkpoint.read import load
from eqat_mm.checkpoint.verify import require_listed
from eqat_mm.quant.bit_widths import UNQUANTIZED
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.verify.checks import Check, not_looked_at, tried
from eqat_mm.verify.files import file_checks
from eqat_mm.verify.logits import in_model, logits_check
from eqat_mm.verify.packed import Opened, index_check, opened, tensor_checks
from eqat_mm.verify.untouched import base_check, integers_check


def checkpoint_checks(
    folder: Path, base: Path | None, place: Callable[[str], Path | None], text: str | None
) -> Iterator[Check]:
    """Yield what becomes of each check of a packed checkpoint.

    Args:
        folder: of the checkpoint.
        base: of the full-precision model it was made from; None where that is not here.
        place: returns the folder of another checkpoint by the name it had, None where it is not here.
        text: to compare logits on; None leaves them out.

    Raises:
        CheckpointError: the folder is no checkpoint, or its manifest was altered.
    """
    manifest = read_manifest(folder)
    yield Check("manifest", True, _of_manifest(manifest))
    yield from tried("files", lambda: list(file_checks(folder, manifest.files, MANIFEST)))
    yield from tried("others", lambda: _nothing_else(folder, manifest))
    yield from tried("index", lambda: index_check(folder))
    read = tried("config", lambda: _config(folder, manifest))
    yield from read
    if not read[0].passed:
        return
    one = opened(folder)
    yield from tried("tensors", lambda: tensor_checks(one))
    yield from tried("integers", lambda: integers_check(one, manifest, place))
    if base is None:
        yield not_looked_at("untouched", f"{manifest.source} is not here: name its folder with --base")
    else:
        yield from tried("untouched", lambda: base_check(one, base, manifest, skeleton(folder, manifest)))
    yield from _logits(one, manifest, text)


def _of_manifest(manifest: Manifest) -> str:
    made = f"{manifest.stage} of {manifest.source}, {QuantSpec(**manifest.spec).name}"
    return made if manifest.unnoticed is None else f"{made}; of an older version, without its own hash"


def _nothing_else(folder: Path, manifest: Manifest) -> Check:
    require_listed(folder, manifest)
    return Check("others", True, "no file beside them that would be read, too")


def _config(folder: Path, manifest: Manifest) -> Check:
    """Check that config.json, manifest and headers describe one model: that is what loading looks at."""
    load(folder, dtype=torch.float32, verify=False)
    return Check("config", True, "every tensor has its place in the model of config.json, and no place is empty")


def _logits(one: Opened, manifest: Manifest, text: str | None) -> list[Check]:
    if text is None:
        return [not_looked_at("logits", "left out")]
    if manifest.has_adapters or not manifest.activation_bits == manifest.kv_cache_bits == UNQUANTIZED:
        return [not_looked_at("logits", "adapters, activations or a KV cache are not in a dense model")]

    def look() -> Check:
        name = in_model(one, manifest)
        weights = ((name(linear), one.held(linear).weight()) for linear in one.linears)
        return logits_check(one, manifest, weights, text, exact=True)

    return tried("logits", look)
