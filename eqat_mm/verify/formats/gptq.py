"""GPTQ in its second version: words transposed, zero points as they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from eqat_mm.runtime.files import read_json_object
from eqat_mm.verify.formats.folder import slabs_of
from eqat_mm.verify.formats.part import Part
from eqat_mm.verify.held import unpacked

_PACKED = ("qzeros", "scales", "g_idx")


def parts(folder: Path) -> Iterator[Part]:
    """Yield every tensor of the folder.

    Raises:
        ValueError: settings of another version.
    """
    settings, slabs = read_json_object(folder / "config.json")["quantization_config"], slabs_of(folder)
    if settings["checkpoint_format"] != "gptq_v2" or settings["desc_act"]:
        raise ValueError(f"checkpoint_format {settings['checkpoint_format']}, desc_act {settings['desc_act']}")
    bits, size = settings["bits"], settings["group_size"]
    for name, slab in slabs.items():
        linear, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            words, scale = slab.stored().T, slabs[f"{linear}.scales"].numbers().T
            groups = slabs[f"{linear}.g_idx"].stored()
            columns = len(groups)
            if not np.array_equal(groups, np.arange(columns) // (columns if size == -1 else size)):
                raise ValueError(f"{linear}.g_idx is not that of consecutive groups of {size}")
            zeros = unpacked(slabs[f"{linear}.qzeros"].stored(), bits, len(scale)).T
            steps = unpacked(words, bits, columns).astype(np.float32) - zeros[:, groups].astype(np.float32)
            yield Part(f"{linear}.weight", steps * scale[:, groups])
        elif leaf not in _PACKED:
            yield Part(name, slab.numbers())
