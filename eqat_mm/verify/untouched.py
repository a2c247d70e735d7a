"""What no training touched is compared with where it came from, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from eqat_mm.blocks.names import module_names
from eqat_mm.blocks.source import weight_files
from eqat_mm.checkpoint.manifest import Manifest
from eqat_mm.checkpoint.source import packed_names
from eqat_mm.verify.checks import Check, judged, not_looked_at
from eqat_mm.verify.packed import Opened
from eqat_mm.verify.slabs import Slab, slabs_in

_PACKED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


def base_check(one: Opened, base: Path, manifest: Manifest, model: transformers.PreTrainedModel) -> Check:
    """Compare everything that is not quantized with the full-precision model.

    Args:
        one: the checkpoint.
        base: folder of the model that it was made from.
        manifest: of the checkpoint.
        model: of both, empty and not packed: it says what is called how in files.
    """
    may_change = trained(manifest)
    ours = named({name: slab for name, slab in one.slabs.items() if not _quantized(name, one)}, packed_names(model))
    full = (slab for path in weight_files(base) for slab in slabs_in(path).values())
    theirs = named({slab.name: slab for slab in full}, module_names(model))
    differ = [name for name, slab in ours.items() if name not in theirs or not same(slab, theirs[name])]
    wrong = [f"{name} is not that of {base.name}" for name in differ if not may_change(name)]
    changed = sum(map(may_change, differ))
    said = f"{len(ours) - len(differ)} tensors byte for byte as in {base}"
    return judged("untouched", wrong, said + (f", {changed} trained" if changed else ""))


def integers_check(one: Opened, manifest: Manifest, place: Callable[[str], Path | None]) -> Check:
    """Compare codes and zero points with those of the checkpoint whose step sizes were trained.

    Args:
        one: the checkpoint.
        manifest: of it.
        place: returns the folder of a checkpoint by the name it had, None where it is not here.
    """
    tuned = [stage["config"]["quantized"] for stage in manifest.provenance if stage.get("config", {}).get("quantized")]
    if not tuned:
        return not_looked_at("integers", "no stage before the one that made them")
    before = place(tuned[-1])
    if before is None:
        return not_looked_at("integers", f"{tuned[-1]} is not here")
    shards = (slab for path in weight_files(before) for slab in slabs_in(path).values())
    theirs = {slab.name: slab for slab in shards}
    return judged("integers", list(_others(one, theirs, str(before))), f"all codes and zero points as in {before}")


def _others(one: Opened, theirs: dict[str, Slab], where: str) -> Iterable[str]:
    tails = {name.rpartition("layers.")[2]: slab for name, slab in theirs.items()}  # prefixes may differ
    for name, slab in one.slabs.items():
        if name.endswith(("weight_packed", "weight_zero_point")):
            other = tails.get(name.rpartition("layers.")[2])
            if other is None or not same(slab, other):
                yield f"{name} is not that of {where}"


def named(slabs: dict[str, Slab], rename: Callable[[str], str]) -> dict[str, Slab]:
    """Return tensors by their names in the model."""
    return {rename(name): slab for name, slab in slabs.items()}


def same(left: Slab, right: Slab) -> bool:
    """Whether two tensors have one dtype, one shape and the same bytes."""
    kind = (left.dtype, left.shape) == (right.dtype, right.shape)
    return kind and np.array_equal(_bytes(left), _bytes(right))


def trained(manifest: Manifest) -> Callable[[str], bool]:
    """Return whether the stages of a checkpoint may have changed a tensor that is not quantized."""
    stages = [(str(stage.get("command", "")), stage.get("config", {})) for stage in manifest.provenance]
    commands = {command for command, _ in stages}
    if commands & {"llm-qat", "save_pretrained"}:  # all weights are trained; whatever somebody did in memory
        return lambda _: True
    norms = "block-ap" in commands
    projector = any("projector" in str(config.get("trains", "")) for _, config in stages)

    def may(name: str) -> bool:
        return (norms and ".layers." in name and "norm" in name) or (projector and "projector" in name)

    return may


def _bytes(slab: Slab) -> Any:
    return np.ascontiguousarray(slab.stored()).reshape(-1).view(np.uint8)


def _quantized(name: str, one: Opened) -> bool:
    linear, _, leaf = name.rpartition(".")
    return leaf in _PACKED or (leaf == "weight" and f"{linear}.weight_scale" in one.slabs)
