"""From what a user types after --model to a folder and a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from eqat_mm.blocks.source import CheckedFolder, WeightSource, say_left_over
from eqat_mm.checkpoint.folders import check_full_precision, is_packed, load_for_inference
from eqat_mm.checkpoint.manifest import checkpoint_folder
from eqat_mm.checkpoint.step_sizes import is_step_sizes
from eqat_mm.errors import CheckpointError, ConfigError, DataError
from eqat_mm.runtime.files import read_json_object
from eqat_mm.runtime.plugins import MODELS, plugged, plugged_function
from eqat_mm.runtime.precision import Precision
from eqat_mm.runtime.progress import progress
from llava_adapters import resolve_alias
from llava_adapters.original import refuse_original_folder

_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def model_folder(model: str, files: Sequence[str] = _FILES) -> Path:
    """Return the local folder of a model: a folder, an alias or a hub repository (downloaded on first use).

    The folder of a run stands for the checkpoint in it.

    Args:
        model: what follows --model.
        files: patterns of what is downloaded of a repository.

    Raises:
        AdapterError: unknown name.
        CheckpointError: a file.
        DataError: the download failed.
    """
    _require_no_file(Path(model))
    resolved = resolve_alias(model)
    folder = Path(resolved)
    if folder.is_dir():
        return checkpoint_folder(folder)
    if resolved in plugged(MODELS):
        return Path(plugged_function(MODELS, resolved)())
    try:
        return Path(snapshot_download(resolved, allow_patterns=list(files)))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, OSError) as error:
        raise DataError(
            where=f"--model {model}",
            given=f"{resolved} cannot be fetched from the hub ({type(error).__name__})",
            allowed="a repository that this machine can reach, or a local folder",
            do="check the name and the network (HF_TOKEN for gated models), or give the path of a downloaded folder",
        ) from error


def _require_no_file(path: Path) -> None:
    if not path.is_file():
        return
    given, do = "a file", "name the folder that it lies in, with config.json beside it"
    if is_step_sizes(path):
        given = "step sizes of a task, without the integers of its base"
        do = "put it over its base with `eqat adapter apply`, and name the folder that this writes"
    raise CheckpointError(where=str(path), given=given, allowed="a folder of a model, an alias or a repository", do=do)


def load_model(
    folder: Path, device: torch.device, dtype: torch.dtype | Precision = "auto"
) -> transformers.PreTrainedModel:
    """Load a packed or a full-precision model, language or vision-language, for evaluation.

    Args:
        folder: of the model.
        device: to load to.
        dtype: of what is not quantized; `auto` as in `unquantized_dtype`.

    Raises:
        CheckpointError: the folder is not a model, or is damaged.
        AdapterError: a LLaVA in its original layout.
    """
    require_model(folder)
    return load_for_inference(folder, device, dtype)


def require_model(folder: Path) -> None:
    """Check that the folder is a Hugging Face model folder.

    Raises:
        CheckpointError: it has no config.json.
        AdapterError: it is a LLaVA in its original layout, which transformers would take for an empty one of its own.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            where=str(folder),
            given="no config.json" if folder.is_dir() else "no such folder",
            allowed="a Hugging Face model folder, or one written by `eqat block-ap` or `eqat e2e-qp`",
            do="check the path; an interrupted run is finished by starting the same command again",
        )
    refuse_original_folder(folder, read_json_object(folder / "config.json"))


def refuse_packed(model: str, folder: Path) -> None:
    """Check that what a user types after --model is no packed checkpoint.

    Raises:
        ConfigError: it is one.
    """
    if is_packed(folder):
        raise ConfigError(
            where=f"--model {model}",
            given="a checkpoint that is quantized already",
            allowed="a full-precision model",
            do="name the model it was made from",
        )


def require_weights(folder: Path) -> CheckedFolder | None:
    """Check that the folder holds a whole model that can be read, before any work is done with it.

    Returns:
        What was found out about a full-precision model, None of a packed one, whose hashes are checked as it is loaded.

    Raises:
        CheckpointError: a broken file; in full precision, something that `check_stored` refuses.
        AdapterError: a LLaVA in its original layout.
    """
    require_model(folder)
    if is_packed(folder):
        return None
    checked = check_full_precision(folder)
    say_left_over(checked.left_over)
    return checked


def require_finite(source: WeightSource) -> None:
    """Read every tensor once, before a run begins that would come to some of them only hours later.

    Raises:
        CheckpointError: one is not finite.
    """
    names = source.names()
    for name in progress(names, what="check weights", total=len(names), unit="tensor"):
        source.read(name)


def require_teacher(folder: Path) -> Path:
    """Check a model that teaches, values too: it is loaded only when the run has begun; return its folder.

    Raises:
        EqatError: as `require_weights` and `require_finite`.
    """
    checked = require_weights(folder)
    if checked is not None:
        require_finite(checked.source)
    return folder
