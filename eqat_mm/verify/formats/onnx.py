"""The folder that Olive's tools take, of which ONNX Runtime's MatMulNBits are made: codes and zero points in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from eqat_mm.runtime.files import read_json_object
from eqat_mm.verify.formats.folder import slabs_of
from eqat_mm.verify.formats.part import Part, by_group
from eqat_mm.verify.held import unpacked


def parts(folder: Path) -> Iterator[Part]:
    """Yield every tensor of the folder."""
    settings, slabs = read_json_object(folder / "config.json")["quantization_config"], slabs_of(folder)
    bits, size = settings["bits"], settings["group_size"]
    for name, slab in slabs.items():
        linear, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            scale = slabs[f"{linear}.scales"].numbers()
            columns = scale.shape[1] * size
            zeros = np.full(scale.shape, 1 << bits - 1, np.uint8)
            if f"{linear}.qzeros" in slabs:
                zeros = unpacked(slabs[f"{linear}.qzeros"].stored(), bits, scale.shape[1])
            steps = unpacked(slab.stored(), bits, columns) - by_group(zeros, columns)
            yield Part(f"{linear}.weight", steps * by_group(scale, columns))
        elif leaf not in ("scales", "qzeros"):
            yield Part(name, slab.numbers())
