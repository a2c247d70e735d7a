"""What is checked of the tensors of a packed checkpoint, one linear in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eqat_mm.errors import CheckpointError
from eqat_mm.quant.grid import smallest_step
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json_object
from eqat_mm.runtime.progress import progress
from eqat_mm.verify.checks import Check, judged
from eqat_mm.verify.held import Held, held_in
from eqat_mm.verify.slabs import Slab, slabs_in

_SCALE = ".weight_scale"


@dataclass(frozen=True)
class Opened:
    """A packed checkpoint as its bytes are.

    Attributes:
        folder: of it.
        specs: what its config.json says of quantized linears: spec by what it is said of, a class or an expression.
        slabs: tensors by the names in the files.
        linears: names of quantized linears in the files.
    """

    folder: Path
    specs: dict[str, QuantSpec]
    slabs: dict[str, Slab]
    linears: list[str]

    def held(self, linear: str) -> Held:
        """Return what is held of a linear."""
        return held_in(self.slabs, linear, self.spec_of(linear).bits)

    def spec_of(self, linear: str) -> QuantSpec:
        """Return what config.json says of a linear.

        Raises:
            CheckpointError: nothing.
        """
        for target, spec in self.specs.items():
            if target == "Linear" or re.fullmatch(target.removeprefix("re:"), linear):
                return spec
        raise CheckpointError(str(self.folder), f"no group for {linear}", "one in config.json", "copy or make it again")


def opened(folder: Path) -> Opened:
    """Return a checkpoint, of which nothing but the headers is read."""
    entry = read_json_object(folder / "config.json")["quantization_config"]
    shards = sorted(set(read_json_object(folder / "model.safetensors.index.json")["weight_map"].values()))
    slabs = {name: slab for shard in shards for name, slab in slabs_in(folder / shard).items()}
    linears = [name.removesuffix(_SCALE) for name in slabs if name.endswith(_SCALE)]
    half = bool(linears) and slabs[linears[0] + _SCALE].dtype == "F16"
    specs = {
        target: _spec_of(group["weights"], half=half)
        for group in entry["config_groups"].values()
        for target in group["targets"]
    }
    return Opened(folder, specs, slabs, linears)


def _spec_of(weights: dict[str, Any], *, half: bool) -> QuantSpec:
    group = weights["group_size"] or -1
    return QuantSpec(weights["num_bits"], group, weights["symmetric"], "float16" if half else "bfloat16")


def index_check(folder: Path) -> Check:
    """Check that every tensor is in the shard that the index names, and no other."""
    weight_map = read_json_object(folder / "model.safetensors.index.json")["weight_map"]
    found = {(name, path.name) for path in sorted(folder.glob("*.safetensors")) for name in slabs_in(path)}
    wanted = set(weight_map.items())
    wrong = [f"{name} is not in {shard}" for name, shard in sorted(wanted - found)]
    wrong += [f"{name} in {shard} is not listed there" for name, shard in sorted(found - wanted)]
    return judged("index", wrong, f"{len(wanted)} tensors in {len({shard for _, shard in found})} files")


def tensor_checks(one: Opened) -> list[Check]:
    """Check shapes, codes, step sizes and zero points of every quantized linear."""
    wrong: dict[str, list[str]] = {"shapes": [], "codes": [], "zero points": [], "step sizes": []}
    for linear in progress(one.linears, what="unpack", total=len(one.linears), unit="linear"):
        for name, said in _wrong(one, linear):
            wrong[name].append(f"{linear}: {said}")
    specs, readers = list(one.specs.values()), "numpy" if _library() is None else "numpy and compressed-tensors"
    spec, bits = specs[0], ", ".join(sorted({f"{each.bits}" for each in specs}))
    within = f"within {bits} bits, the same to {readers}"
    right = {
        "shapes": f"{len(one.linears)} linears as {', '.join(sorted({each.name for each in specs}))} has them",
        "codes": f"{bits} bits each, the same to {readers}, nothing in the bits left over",
        "zero points": "none stored, in the middle" if spec.symmetric else within,
        "step sizes": f"finite, at least {smallest_step(spec.storage_dtype):.2g} from zero"
        + ("" if spec.symmetric else ", positive"),
    }
    return [judged(name, found, right[name]) for name, found in wrong.items()]


def _wrong(one: Opened, linear: str) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a linear, with the name of the check."""
    misfits = list(_misfits(one, linear))
    if misfits:
        yield from (("shapes", said) for said in misfits)
        return
    held, spec = one.held(linear), one.spec_of(linear)
    smallest = smallest_step(spec.storage_dtype)
    steps = abs(held.scale) if spec.symmetric else held.scale
    bad = {"not finite": ~np.isfinite(held.scale), "zero": held.scale == 0, "too small or negative": steps < smallest}
    for said, where in bad.items():
        if where.any():
            row, group = (int(place) for place in np.argwhere(where)[0])
            yield "step sizes", f"{int(where.sum())} {said}, the first at row {row}, group {group}"
            break
    yield from _unlike_others(one, linear, held)


def _misfits(one: Opened, linear: str) -> Iterator[str]:
    """Yield what of the shapes of a linear does not fit bits, group and grid."""
    spec, slabs = one.spec_of(linear), one.slabs
    stored = {leaf: slabs[f"{linear}.{leaf}"].shape for leaf in _leaves(slabs, linear)}
    whole = "weight_packed" not in stored
    rows, columns = stored.get("weight", (0, 0)) if whole else slabs[f"{linear}.weight_shape"].stored().tolist()
    groups = 1 if spec.group_size == -1 else columns // spec.group_size
    wanted: dict[str, tuple[int, ...]] = {"weight_scale": (rows, groups)}
    wanted |= (
        {"weight": (rows, columns)}
        if whole
        else {
            "weight_packed": (rows, -(-columns * spec.bits // 32)),
            "weight_shape": (2,),
        }
    )
    wanted |= {} if spec.symmetric else {"weight_zero_point": (-(-rows * spec.bits // 32), groups)}
    if spec.group_size != -1 and columns % spec.group_size:
        yield f"{columns} inputs in groups of {spec.group_size}"
    for leaf in sorted(wanted.keys() | stored.keys()):
        if wanted.get(leaf) != stored.get(leaf):
            given, fitting = (list(shapes.get(leaf, ())) or "none" for shapes in (stored, wanted))
            yield f"{leaf} {given}, for {spec.name} {fitting}"


def _leaves(slabs: dict[str, Slab], linear: str) -> list[str]:
    leaves = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
    return [leaf for leaf in leaves if f"{linear}.{leaf}" in slabs]


def _library() -> Any:
    """Return the functions of compressed-tensors that unpack; None where the package is missing."""
    if find_spec("compressed_tensors") is None:
        return None
    return import_module("compressed_tensors.compressors.pack_quantized.helpers")


def _unlike_others(one: Opened, linear: str, held: Held) -> Iterator[tuple[str, str]]:
    """Yield where the library that others read with gets something else, or packs it to other words."""
    library, slabs, spec = _library(), one.slabs, one.spec_of(linear)
    packed = slabs.get(f"{linear}.weight_packed")
    if library is None or packed is None:
        return
    pairs = [("codes", packed, held.codes, 1)]
    if not spec.symmetric:
        pairs.append(("zero points", slabs[f"{linear}.weight_zero_point"], held.zeros, 0))
    for name, slab, ours, axis in pairs:
        words = torch.from_numpy(np.array(slab.stored()))
        theirs = library.unpack_from_int32(words, spec.bits, torch.Size(ours.shape), packed_dim=axis)
        if not np.array_equal(theirs.numpy().astype(np.int16) + spec.middle, ours):
            yield name, "compressed-tensors unpacks others"
        elif not torch.equal(library.pack_to_int32(theirs.contiguous(), spec.bits, packed_dim=axis), words):
            yield name, "something is in the bits behind the last one"
