"""What a model folder holds, packed or not: a model, a tokenizer, a processor."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from eqat_mm.checkpoint.read import load
from eqat_mm.checkpoint.verify import MANIFEST
from eqat_mm.errors import CheckpointError
from eqat_mm.runtime.precision import Precision, unquantized_dtype


def is_packed(folder: Path) -> bool:
    """Whether the folder holds a checkpoint of ours."""
    return (folder / MANIFEST).is_file()


def takes_images(folder: Path) -> bool:
    """Whether the folder holds a vision-language model, by its configuration."""
    config = transformers.AutoConfig.from_pretrained(folder)
    return type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def load_for_inference(
    folder: Path, device: torch.device, dtype: torch.dtype | Precision = "auto"
) -> transformers.PreTrainedModel:
    """Load a packed or a full-precision model, language or vision-language, in eval mode.

    Args:
        folder: of the model.
        device: to load to.
        dtype: of what is not quantized; `auto` as in `unquantized_dtype`.

    Raises:
        CheckpointError: a packed model is damaged.
    """
    if is_packed(folder):
        return load(folder, dtype=dtype, device=device)
    auto = transformers.AutoModelForImageTextToText if takes_images(folder) else transformers.AutoModelForCausalLM
    kept = unquantized_dtype(dtype, device)
    model: transformers.PreTrainedModel = auto.from_pretrained(folder, dtype=kept)
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
