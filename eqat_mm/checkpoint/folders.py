"""What a model folder holds, packed or not: a model, a tokenizer, a processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import transformers

from eqat_mm.blocks.config import read_config, refused
from eqat_mm.blocks.source import CheckedFolder, check_folder
from eqat_mm.blocks.weights import WeightSource, is_finite
from eqat_mm.checkpoint.companions import PROCESSOR, TOKENIZER, files_like
from eqat_mm.checkpoint.manifest import MANIFEST
from eqat_mm.checkpoint.verify import verify_all_but_weights
from eqat_mm.errors import CheckpointError
from eqat_mm.runtime.precision import Precision, unquantized_dtype


def is_packed(folder: Path) -> bool:
    """Whether the folder holds a checkpoint of ours."""
    return (folder / MANIFEST).is_file()


def takes_images(folder: Path) -> bool:
    """Whether the folder holds a vision-language model, by its configuration.

    Raises:
        CheckpointError: config.json is missing or broken.
    """
    return type(read_config(folder)) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def check_full_precision(folder: Path) -> CheckedFolder:
    """Check that transformers would read a whole full-precision model in the folder, and nothing else.

    Raises:
        CheckpointError: a broken file, or something that `check_stored` refuses.
    """
    return check_folder(folder, _auto_class(folder))


def _auto_class(folder: Path) -> Literal["AutoModelForCausalLM", "AutoModelForImageTextToText"]:
    return "AutoModelForImageTextToText" if takes_images(folder) else "AutoModelForCausalLM"


def load_for_inference(
    folder: Path, device: torch.device, dtype: torch.dtype | Precision = "auto"
) -> transformers.PreTrainedModel:
    """Load a packed or a full-precision model, language or vision-language, in eval mode.

    Args:
        folder: of the model.
        device: to load to.
        dtype: of what is not quantized; `auto` as in `unquantized_dtype`.

    Raises:
        CheckpointError: a packed model is damaged; a full-precision one is not whole, quantized already or not finite.
    """
    from eqat_mm.checkpoint.read import load  # what is read can be written, with the processor that lies here

    if is_packed(folder):
        return load(folder, dtype=dtype, device=device)
    checked, kept = check_full_precision(folder), unquantized_dtype(dtype, device)
    auto = getattr(transformers, _auto_class(folder))
    with refused(folder, "model"):
        model: transformers.PreTrainedModel = auto.from_pretrained(folder, config=checked.config, dtype=kept)
    _require_finite(model, checked.source)
    torch.nn.Module.to(model, device)
    model.eval()
    model.requires_grad_(False)
    return model


def _require_finite(model: transformers.PreTrainedModel, source: WeightSource) -> None:
    """Check what was read from a folder, without reading it a second time.

    Raises:
        CheckpointError: a tensor is not finite, in the files or in the dtype that it was read to.
    """
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            if name in source:
                source.read(name)
            raise CheckpointError(
                where=f"{source.folder}: {name}",
                given=f"values that are not finite as {str(parameter.dtype).removeprefix('torch.')}",
                allowed="weights within the range of the dtype they are read to",
                do="choose a dtype of wider range: --dtype bfloat16 or float32",
            )


def load_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        CheckpointError: there is none, or it is that of another model; or a packed checkpoint was altered.
    """
    _require_unaltered(folder)
    do = "put the files of the model's tokenizer beside the weights, all of them"
    with refused(folder, _with_files("tokenizer", folder, TOKENIZER), do=do):
        auto = transformers.AutoTokenizer
        tokenizer: transformers.PreTrainedTokenizerBase = auto.from_pretrained(folder, trust_remote_code=False)
    rows = getattr(read_config(folder).get_text_config(decoder=True), "vocab_size", tokenizer.vocab_size)
    if tokenizer.vocab_size > rows:
        raise CheckpointError(
            where=str(folder),
            given=f"a tokenizer of {tokenizer.vocab_size} tokens for a model that knows {rows}",
            allowed=f"up to {rows} tokens, special ones that were added apart",
            do="put the tokenizer's files of this model beside the weights",
        )
    return tokenizer


def load_processor(folder: Path) -> transformers.ProcessorMixin:
    """Load the processor of a vision-language model folder: tokenizer, image processor and chat template.

    Raises:
        CheckpointError: there is none, or a package that it needs is not installed; or a packed checkpoint was altered.
    """
    _require_unaltered(folder)
    do = "put the processor's files beside the weights, and install what reads images: pip install 'eqat-mm[vlm]'"
    with refused(folder, _with_files("processor", folder, (*PROCESSOR, *TOKENIZER)), do=do):
        processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(processor, transformers.ProcessorMixin):
            raise TypeError(f"a text-only {type(processor).__name__}")
    return processor


def _require_unaltered(folder: Path) -> None:
    """Check the files of a packed checkpoint that are read before its weights are."""
    if is_packed(folder):
        verify_all_but_weights(folder)


def _with_files(what: str, folder: Path, patterns: Sequence[str]) -> str:
    """Return what is read, with the files that it is read from."""
    return f"{what} in {', '.join(files_like(folder, patterns)) or 'it'}"
