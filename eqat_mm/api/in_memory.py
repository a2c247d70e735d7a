"""Models that a user has in memory: what commands read of them lies in a folder of the run."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from eqat_mm.checkpoint.adapters import has_adapters
from eqat_mm.checkpoint.changed import is_as_loaded
from eqat_mm.checkpoint.companions import copy_companions
from eqat_mm.checkpoint.folders import is_packed
from eqat_mm.checkpoint.pretrained import SavesPacked
from eqat_mm.checkpoint.unfinished import folder_in_the_making
from eqat_mm.commands.runs import model_fingerprint
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.device import processes
from eqat_mm.runtime.files import fingerprint_of, read_json, write_json
from eqat_mm.runtime.progress import say, size
from eqat_mm.runtime.room import require_disk

NOTE = "source.json"
"""File beside a written model: a hash of all its weights. Runs on the model depend on what it says."""

_OF_SAVING = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")
"""What saving writes into a configuration."""


def is_packed_model(model: object) -> bool:
    """Whether it is a model as `load` returns it."""
    return isinstance(model, SavesPacked)


def name_of(model: PreTrainedModel) -> str:
    """Return the name that runs on a model in memory are called by."""
    return Path(model.name_or_path or "").name or str(model.config.model_type)


def require_model(model: Any) -> None:
    """Check that something in memory is a model.

    Raises:
        ConfigError: it is no transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        do = "merge the adapters first: model = model.merge_and_unload()" if has_adapters(model) else "give one of them"
        raise ConfigError("model", type(model).__name__, "a name, a folder, or a transformers model", do)


def require_full_precision(model: Any) -> None:
    """Check that a model in memory can be quantized.

    Raises:
        ConfigError: it is no transformers model, quantized already, has adapters, or its weights lie elsewhere.
    """
    require_model(model)
    allowed, do = "a full-precision model", "give the model that it was made from"
    if is_packed_model(model) or _is_quantized(model):
        raise ConfigError("model", f"a {type(model).__name__} that is quantized already", allowed, do)
    if has_adapters(model):
        do = "merge the adapters first: model = model.merge_and_unload()"
        raise ConfigError("model", f"a {type(model).__name__} with adapters", allowed, do)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        do = "load it without device_map, or give its folder"
        raise ConfigError("model", f"a {type(model).__name__} with weights on the meta device", allowed, do)
    if processes() > 1:
        do = "save it first with save_pretrained, and give the folder"
        raise ConfigError("model", f"a model in memory, in {processes()} processes", "a name or a folder", do)


def _is_quantized(model: PreTrainedModel) -> bool:
    """Whether weights are quantized, or were: transformers gives those of a packed checkpoint as dense ones."""
    stored = getattr(model, "is_quantized", False) or hasattr(model.config, "quantization_config")
    return bool(stored) or is_packed(Path(model.name_or_path or ""))


@contextmanager
def configuration_of(model: PreTrainedModel) -> Iterator[str]:
    """Yield a folder with the configuration of a model alone, which decides its recipe and its plan."""
    with TemporaryDirectory() as name:
        model.config.save_pretrained(name)
        yield name


def written(model: PreTrainedModel, folder: Path, processor: Any, *, overwrite: bool) -> Path:
    """Write a full-precision model to a folder, unless it is there already; return the folder.

    Args:
        model: as `require_full_precision` allows it; weights keep their dtype.
        folder: written whole or not at all.
        processor: processor or tokenizer that goes with it; None takes that of the model's `name_or_path`.
        overwrite: replace another model that was written there.

    Raises:
        ConfigError: another model was written there, or there is no processor.
        ResourceError: the disk has no room.
    """
    with TemporaryDirectory() as name:
        _save_processor(model, Path(name), processor)
        digest = _digest(model, Path(name))
        before = read_json(folder / NOTE) if (folder / NOTE).is_file() else None
        if before is not None and before["sha256"] == digest:
            say(f"the model in memory is the one in {folder}")
            return folder
        if before is not None and not overwrite:
            raise _another(folder)
        needed = sum(tensor.nbytes for tensor in model.state_dict().values())
        require_disk(folder, needed, "the model in memory")
        say(f"the model in memory is written to {folder} ({size(needed)})")
        with folder_in_the_making(folder) as partial:
            shutil.copytree(name, partial, dirs_exist_ok=True)
            model.save_pretrained(partial)
            write_json(partial / NOTE, {"sha256": digest, "class": type(model).__name__, "of": model.name_or_path})
    return folder


def packed_folder(model: PreTrainedModel, folder: Path, *, overwrite: bool) -> Path:
    """Return the folder of a packed model: the one it was loaded from, or `folder` where it was changed since.

    Args:
        model: as `load` gives it.
        folder: a changed model is written there, whole or not at all, unless it is there already.
        overwrite: replace another model that was written there.

    Raises:
        ConfigError: another model was written there.
    """
    if is_as_loaded(model):
        return Path(model.checkpoint_origin.folder)  # type: ignore[union-attr, arg-type]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        fresh = Path(name) / folder.name
        model.save_pretrained(fresh)
        if folder.is_dir() and model_fingerprint(folder) == model_fingerprint(fresh):
            return folder
        if folder.is_dir() and not overwrite:
            raise _another(folder)
        say(f"the model was changed since it was loaded; what it is now is written to {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    return folder


def _another(folder: Path) -> ConfigError:
    return ConfigError(
        where=str(folder),
        given="another model than the one in memory, with which the run there began",
        allowed="the same model, weight by weight",
        do="give another output, or overwrite=True to begin anew",
    )


def _save_processor(model: PreTrainedModel, folder: Path, processor: Any) -> None:
    """Write what goes with a model: its processor or tokenizer, given or found where the model came from.

    Raises:
        ConfigError: there is none.
    """
    origin = model.name_or_path
    if processor is not None:
        processor.save_pretrained(folder)
    elif origin and Path(origin).is_dir():
        copy_companions(Path(origin), folder)
        (folder / "generation_config.json").unlink(missing_ok=True)  # the model writes its own
    elif origin:
        kind = transformers.AutoProcessor if hasattr(model.config, "vision_config") else transformers.AutoTokenizer
        try:
            kind.from_pretrained(origin).save_pretrained(folder)
        except (OSError, ValueError) as error:
            raise _no_processor(f"none at {origin}, where the model came from") from error
    if not any(folder.glob("tokenizer*")):
        raise _no_processor(f"none at {origin}" if origin else "a model that came from no folder")


def _no_processor(given: str) -> ConfigError:
    allowed = "the processor of a vision-language model, or the tokenizer of a language model"
    return ConfigError("processor", given, allowed, "give it: processor=AutoProcessor.from_pretrained(...)")


def _digest(model: PreTrainedModel, beside: Path) -> str:
    """Return a hash of all weights, of configuration and generation settings, and of what lies beside."""
    found = hashlib.sha256(fingerprint_of(path for path in beside.rglob("*") if path.is_file()).encode())
    for settings in (model.config, model.generation_config):
        plain = {} if settings is None else settings.to_dict()
        kept = {name: value for name, value in plain.items() if name not in _OF_SAVING}
        found.update(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        found.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
