"""MLX's affine groups: weight = scales * code + biases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from eqat_mm.runtime.files import read_json_object
from eqat_mm.verify.formats.folder import slabs_of
from eqat_mm.verify.formats.part import Part, by_group
from eqat_mm.verify.held import unpacked


def parts(folder: Path) -> Iterator[Part]:
    """Yield every tensor of the folder."""
    settings, slabs = read_json_object(folder / "config.json")["quantization"], slabs_of(folder)
    group = settings["group_size"]
    for name, slab in slabs.items():
        linear, _, leaf = name.rpartition(".")
        if f"{linear}.scales" not in slabs:
            yield Part(name, slab.numbers())
        elif leaf == "weight":
            scales, biases = (slabs[f"{linear}.{each}"].numbers() for each in ("scales", "biases"))
            columns = scales.shape[1] * group
            codes = unpacked(slab.stored(), settings.get(linear, settings)["bits"], columns)
            yield Part(name, codes * by_group(scales, columns) + by_group(biases, columns))
        elif leaf == "bias":
            yield Part(name, slab.numbers())
