"""From what a user types after --model to a folder, a model and a tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from eqat_mm.blocks.source import WeightSource, weight_files
from eqat_mm.checkpoint.read import load
from eqat_mm.checkpoint.verify import MANIFEST
from eqat_mm.data.smollm2 import smollm2_folder
from eqat_mm.errors import CheckpointError, ConfigError, DataError
from llava_adapters import resolve_alias

_ASSET_MODELS = {"smollm2-135m": smollm2_folder}
_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def model_folder(model: str) -> Path:
    """Return the local folder of a model: a folder, an alias or a hub repository (downloaded on first use).

    Raises:
        AdapterError: unknown name.
        DataError: the download failed.
    """
    resolved = resolve_alias(model)
    if resolved.startswith("asset:"):
        return _ASSET_MODELS[resolved.removeprefix("asset:")]()
    if Path(resolved).is_dir():
        return Path(resolved)
    try:
        return Path(snapshot_download(resolved, allow_patterns=_FILES))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, OSError) as error:
        raise DataError(
            where=f"--model {model}",
            given=f"{resolved} cannot be fetched from the hub ({type(error).__name__})",
            allowed="a repository that this machine can reach, or a local folder",
            do="check the name and the network (HF_TOKEN for gated models), or give the path of a downloaded folder",
        ) from error


def is_packed(folder: Path) -> bool:
    """Whether the folder holds a checkpoint of ours."""
    return (folder / MANIFEST).is_file()


def load_model(folder: Path, device: torch.device) -> transformers.PreTrainedModel:
    """Load a packed or a full-precision causal language model for evaluation, float32 where unquantized.

    Raises:
        CheckpointError: the folder is not a model, or is damaged.
    """
    if is_packed(folder):
        return load(folder, device=device)
    require_weights(folder)
    model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.nn.Module.to(model, device)
    model.eval()
    model.requires_grad_(False)
    return model


def load_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        CheckpointError: there is none.
    """
    try:
        tokenizer: transformers.PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            where=str(folder),
            given=f"no usable tokenizer ({' '.join(str(error).split())[:200]})",
            allowed="a model folder with the files of its tokenizer",
            do="put the tokenizer's files beside the weights",
        ) from error
    return tokenizer


def require_model(folder: Path) -> None:
    """Check that the folder is a Hugging Face model folder.

    Raises:
        CheckpointError: it has no config.json.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            where=str(folder),
            given="no config.json" if folder.is_dir() else "no such folder",
            allowed="a Hugging Face model folder, or one written by `eqat block-ap` or `eqat e2e-qp`",
            do="check the path; an interrupted run is finished by starting the same command again",
        )


def require_weights(folder: Path) -> None:
    """Check that the folder is a model folder whose weight files can be opened.

    Raises:
        CheckpointError: no config.json, or a weight file is missing or truncated.
    """
    require_model(folder)
    for path in weight_files(folder):
        WeightSource.names_of(path)


def best_device(device: str) -> torch.device:
    """Return the device to compute on; `auto` is the first GPU, or the CPU where there is none.

    Raises:
        ConfigError: unknown, or not on this machine.
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if device == "auto":
        return torch.device("cuda" if gpus else "cpu")
    allowed = ["cpu", *(["cuda"] if gpus else []), *gpus]
    if device not in allowed:
        raise ConfigError("--device", repr(device), f"{', '.join(allowed)} or auto", "choose one of these")
    return torch.device(device)
