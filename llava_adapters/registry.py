"""Which adapter serves which model, and the short names of models.

A new architecture is one file beside this one and one entry in `_BUILT_IN`. Other packages register an `Arch`
under the entry-point group `eqat_mm.adapters`.
"""

from __future__ import annotations

import difflib
import logging
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from eqat_mm.blocks.arch import Arch
from eqat_mm.errors import AdapterError, CheckpointError
from eqat_mm.runtime.files import read_json_object
from eqat_mm.runtime.plugins import MODELS, package_of, plugged
from llava_adapters import (
    gemma3,
    gemma3_text,
    granite,
    idefics3,
    internvl,
    llama,
    llava,
    llava_next,
    llava_next_video,
    llava_onevision,
    ministral,
    mistral,
    mistral3,
    mixtral,
    olmo2,
    paligemma,
    phi3,
    qwen2,
    qwen2_5_vl,
    qwen3,
    qwen3_moe,
    qwen3_vl,
    smollm3,
    smolvlm,
    vipllava,
)
from llava_adapters.aliases import ALIASES
from llava_adapters.original import refuse_original_folder, refuse_original_repository

log = logging.getLogger(__name__)

GROUP = "eqat_mm.adapters"

_BUILT_IN: tuple[Arch, ...] = tuple(
    module.ARCH
    for module in (
        llama,
        mistral,
        ministral,
        qwen2,
        qwen3,
        gemma3_text,
        olmo2,
        granite,
        smollm3,
        phi3,
        mixtral,
        qwen3_moe,
        llava,
        llava_next,
        llava_onevision,
        llava_next_video,
        vipllava,
        qwen2_5_vl,
        qwen3_vl,
        gemma3,
        internvl,
        idefics3,
        smolvlm,
        mistral3,
        paligemma,
    )
)


@lru_cache(maxsize=1)
def known_archs() -> dict[str, Arch]:
    """Return every registered architecture by name: built in, then from other packages.

    One that cannot be used is named once and left out; of two with one name the built-in one, or the first, serves.
    """
    archs = {arch.name: arch for arch in _BUILT_IN}
    for entry in entry_points(group=GROUP):
        arch, reason = _loaded(entry, archs)
        if arch is not None:
            archs[arch.name] = arch
        else:
            log.warning(
                "note: the adapter %s of the package %s is not used: %s", entry.value, package_of(entry), reason
            )
    return archs


def _loaded(entry: EntryPoint, archs: dict[str, Arch]) -> tuple[Arch | None, str]:
    """Return the adapter behind an entry point, or the reason why it is not used."""
    try:
        arch = entry.load()
    except Exception as error:  # noqa: BLE001 - whatever another package raises, models of others are served
        return None, f"{type(error).__name__}: {error}"
    if not isinstance(arch, Arch):
        return None, f"it is a {type(arch).__name__}, not an instance of eqat_mm.blocks.Arch"
    return (None, f"the name {arch.name!r} is taken") if arch.name in archs else (arch, "")


def arch_for(name: str, where: str = "--adapter") -> Arch:
    """Return the architecture called `name`.

    Args:
        name: of an adapter.
        where: it is named, for the message.

    Raises:
        AdapterError: unknown name; lists near ones.
    """
    archs = known_archs()
    if name in archs:
        return archs[name]
    raise AdapterError(
        where=where,
        given=repr(name),
        allowed=", ".join(sorted(archs)),
        do="choose one of these, install the package that has it, or add an adapter (docs/adding_a_model.md)",
    )


def arch_of_folder(folder: Path, adapter: str | None = None) -> Arch:
    """Return the architecture of the model in `folder`, by its config.json, or the one named `adapter`.

    Raises:
        CheckpointError: `folder` is not a model folder.
        AdapterError: no adapter serves its model type, or it is a LLaVA in its original layout.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            where=str(folder),
            given="no config.json",
            allowed="a Hugging Face model folder",
            do="check the path",
        )
    return arch_of_config(read_json_object(folder / "config.json"), folder / "config.json", adapter)


def arch_of_config(config: dict[str, Any], path: Path, adapter: str | None = None) -> Arch:
    """Return the architecture of the model that a config.json describes, or the one named `adapter`.

    Args:
        config: its content.
        path: of the file, for messages.
        adapter: name that decides in its place.

    Raises:
        AdapterError: no adapter serves its model type, or it is a LLaVA in its original layout.
    """
    refuse_original_folder(path.parent, config)
    if adapter is not None:
        return arch_for(adapter)
    model_type = config.get("model_type")
    for arch in known_archs().values():
        if model_type in arch.model_types:
            return arch
    served = sorted({kind for arch in known_archs().values() for kind in arch.model_types})
    raise AdapterError(
        where=f"{path}: model_type",
        given=repr(model_type),
        allowed=", ".join(served),
        do="write an adapter for it (docs/adding_a_model.md), or name one that fits with --adapter",
    )


def resolve_alias(model: str) -> str:
    """Return what `model` stands for: an alias expanded; a folder, a repository, a name of another package as it is.

    Raises:
        AdapterError: neither an existing folder, nor an alias, nor of the form `owner/name`; or a LLaVA repository in
            its original layout.
    """
    if Path(model).is_dir() or model in plugged(MODELS):
        return model
    if model in ALIASES:
        return ALIASES[model]
    refuse_original_repository(model)
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return model
    names = sorted([*ALIASES, *plugged(MODELS)])
    near = difflib.get_close_matches(model, names, n=4, cutoff=0.4)
    raise AdapterError(
        where="--model",
        given=repr(model),
        allowed=f"a model folder, a hub repository owner/name, or an alias: {', '.join(near or names)}",
        do="check the spelling; `eqat assets` lists the short names",
    )
