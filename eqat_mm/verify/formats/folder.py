"""A Hugging Face folder of any format: its tensors, as the index has them."""

from __future__ import annotations

from pathlib import Path

from eqat_mm.runtime.files import read_json_object
from eqat_mm.verify.slabs import Slab, slabs_in

_INDEX = "model.safetensors.index.json"


def slabs_of(folder: Path) -> dict[str, Slab]:
    """Return the tensors of a folder by their names in it.

    Raises:
        ValueError: the index names another file than the one that holds a tensor, or a file is damaged.
    """
    listed = read_json_object(folder / _INDEX)["weight_map"] if (folder / _INDEX).is_file() else None
    files = sorted(set(listed.values())) if listed is not None else ["model.safetensors"]
    slabs = {name: slab for file in files for name, slab in slabs_in(folder / file).items()}
    found = {name: slab.path.name for name, slab in slabs.items()}
    if listed is not None and found != listed:
        wrong = sorted(dict(found.items() ^ listed.items()))
        raise ValueError(f"{_INDEX} is wrong about {wrong[0]}")
    return slabs
