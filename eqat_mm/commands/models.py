"""From what a user types after --model to a folder, a model, a tokenizer or a processor."""

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
from eqat_mm.runtime.files import read_json
from llava_adapters import resolve_alias
from llava_adapters.original import refuse_original_folder


def _demo_llava_folder() -> Path:
    from llava_adapters.demo_llava import demo_llava_folder  # it needs what reads images

    return demo_llava_folder()


_ASSET_MODELS = {"smollm2-135m": smollm2_folder, "demo-llava": _demo_llava_folder}
_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def model_folder(model: str) -> Path:
    """Return the local folder of a model: a folder, an alias or a hub repository (downloaded on first use).

    The folder of a run stands for the checkpoint in it.

    Raises:
        AdapterError: unknown name.
        DataError: the download failed.
    """
    resolved = resolve_alias(model)
    if resolved.startswith("asset:"):
        return _ASSET_MODELS[resolved.removeprefix("asset:")]()
    folder = Path(resolved)
    if folder.is_dir():
        return folder / "model" if is_packed(folder / "model") and not is_packed(folder) else folder
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


def takes_images(folder: Path) -> bool:
    """Whether the folder holds a vision-language model, by its configuration."""
    config = transformers.AutoConfig.from_pretrained(folder)
    return type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def load_model(folder: Path, device: torch.device) -> transformers.PreTrainedModel:
    """Load a packed or a full-precision model, language or vision-language, for evaluation; float32 where unquantized.

    Raises:
        CheckpointError: the folder is not a model, or is damaged.
    """
    if is_packed(folder):
        return load(folder, device=device)
    require_weights(folder)
    auto = transformers.AutoModelForImageTextToText if takes_images(folder) else transformers.AutoModelForCausalLM
    model: transformers.PreTrainedModel = auto.from_pretrained(folder, dtype=torch.float32)
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


def load_processor(folder: Path) -> transformers.ProcessorMixin:
    """Load the processor of a vision-language model folder: tokenizer, image processor and chat template.

    Raises:
        CheckpointError: there is none, or a package that it needs is not installed.
    """
    try:
        processor = transformers.AutoProcessor.from_pretrained(folder)
        found = f"a text-only {type(processor).__name__}"
    except (OSError, ValueError, ImportError) as error:
        processor, found = None, " ".join(str(error).split())[:200]
    if isinstance(processor, transformers.ProcessorMixin):
        return processor
    raise CheckpointError(
        where=str(folder),
        given=f"no usable processor ({found})",
        allowed="the folder of a vision-language model, with the files of its tokenizer and its image processor",
        do="put the processor's files beside the weights, and install what reads images: pip install 'eqat-mm[vlm]'",
    )


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
    refuse_original_folder(folder, read_json(folder / "config.json"))


def require_weights(folder: Path) -> None:
    """Check that the folder is a model folder whose weight files can be opened.

    Raises:
        CheckpointError: no config.json, or a weight file is missing or truncated.
        AdapterError: a LLaVA in its original layout.
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
