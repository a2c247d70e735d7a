"""What is written, and who reads it."""

from __future__ import annotations

from importlib.util import find_spec

import torch
import transformers

from eqat_mm.blocks.weights import WeightSource
from eqat_mm.checkpoint.layout import PACKED_SUFFIX
from eqat_mm.checkpoint.read import load
from eqat_mm.checkpoint.source import packed_names
from eqat_mm.contract.case import Case, NotHere, difference
from eqat_mm.contract.training import same_bytes
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.stock import stock_reader
from eqat_mm.train.rtn import run_rtn

_16_BITS = 1e-2
"""Largest difference of logits where the other reader rounds weights to the 16 bits of the step sizes."""


def kept(case: Case) -> None:
    """A checkpoint holds a packed linear for each declared one, and all else byte for byte, under published names."""
    opened = case.open()
    quantized = {
        f"{opened.block_name(index)}.{path}"
        for index, block in enumerate(opened.blocks)
        for path in case.arch.linears_of(block)
    }
    run_rtn(case.open(), QuantSpec(2, 32), case.folder / "kept", source="tiny", provenance={})
    written = WeightSource(case.folder / "kept/model", packed_names(opened.model))  # type: ignore[arg-type]
    packed = {name.removesuffix(PACKED_SUFFIX) for name in written.names() if name.endswith(PACKED_SUFFIX)}
    case.require(packed == quantized, f"{len(packed)} packed linears", f"{len(quantized)}", "look at `stages`")
    for name in (name for name in opened.source.names() if name.removesuffix(".weight") not in packed):
        same = name in written and same_bytes(opened.source.read(name), written.read(name))
        case.require(
            same and opened.source.published_name(name) == written.published_name(name),
            f"{name} differs, or has another name in the files",
            "byte for byte what the source holds",
            "look at `stages` and `full_precision`",
        )


def symmetric(case: Case) -> None:
    """Plain transformers reads a checkpoint on the symmetric grid, and predicts the same."""
    _require_reader(case, QuantSpec(4, 32, symmetric=True))


def asymmetric(case: Case) -> None:
    """Plain transformers reads a checkpoint on the asymmetric grid, and predicts the same."""
    if any(each.experts for block in case.open().blocks for each in case.arch.rounds_of(block)):
        raise NotHere("transformers reads quantized experts on the symmetric grid only")
    _require_reader(case, QuantSpec(4, 32))


def _require_reader(case: Case, spec: QuantSpec) -> None:
    if find_spec("compressed_tensors") is None:
        raise NotHere("compressed-tensors is not installed: pip install 'eqat-mm[export]'")
    folder = case.folder / f"read-{spec.name}"
    run_rtn(case.open(), spec, folder, source="tiny", provenance={})
    auto = getattr(transformers, case.arch.auto_class)
    with stock_reader():
        theirs = auto.from_pretrained(folder / "model", dtype=torch.float32).eval()
    ours = load(folder / "model")
    for inputs in case.batches:
        with torch.no_grad():
            found, expected = (model(**inputs, use_cache=False).logits for model in (theirs, ours))
        error = difference(found, expected)
        case.require(
            error < _16_BITS,
            f"logits that differ by {error:.1e} on the {spec.name} grid",
            f"at most {_16_BITS:g}",
            "look at `ignore` in the checkpoint's config.json, which follows from `kept` and `full_precision`",
        )
