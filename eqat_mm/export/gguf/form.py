"""GGUF: what it holds, and the writing of it, one tensor in memory at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from eqat_mm.errors import ConfigError, ExportError
from eqat_mm.export.form import Choices
from eqat_mm.export.gguf import blocks
from eqat_mm.export.gguf.blocks import Q2_0, Q4_0, Q4_1, Q8_0, BlockType, block_type
from eqat_mm.export.gguf.file import write_file
from eqat_mm.export.gguf.language import language_tensors
from eqat_mm.export.gguf.names import gguf_name, of_vision
from eqat_mm.export.gguf.settings import family_of, require_rope, size_keys
from eqat_mm.export.gguf.tokens import token_keys
from eqat_mm.export.gguf.vision import require_vision, sees, vision_keys, vision_tensors
from eqat_mm.export.opened import PackedModel, PackedWeight

_FILE_TYPES = {Q4_0: 2, Q4_1: 3, Q8_0: 7, Q2_0: 41}
_ALIGNMENT = 32


class GGUF:
    """The format; see `eqat_mm.export.form.Format`."""

    name = "gguf"

    def refuse(self, model: PackedModel, choices: Choices) -> None:
        """Check package, architecture, rotary positions, tokenizer, blocks and names.

        Raises:
            ConfigError: the package `gguf` is not installed.
            ExportError: llama.cpp has no such model.
        """
        if find_spec("gguf") is None:
            do = "pip install 'eqat-mm[export]'"
            raise ConfigError("--to gguf", "gguf is not installed", "an environment with it", do)
        family_of(model)
        require_rope(model)
        for weight in model.weights.values():
            self._type_of(weight)
        names = [*(f"{name}.weight" for name in model.weights), *model.others]
        nameless = [name for name in names if gguf_name(name) is None and not of_vision(name)]
        if nameless:
            raise ExportError(
                where=f"--to gguf, from {model.folder}",
                given=f"{nameless[0]}, for which llama.cpp has no place",
                allowed="the tensors of a Llama, Mistral, Qwen2 or Qwen3",
                do="serve the checkpoint itself (docs/formats.md), or choose another --to",
            )
        token_keys(model, model.text_config.vocab_size)
        if sees(model):
            require_vision(model)

    def changed(self, weight: PackedWeight) -> Tensor:
        """Return the groups whose step size or offset half precision does not hold, bool [O, G]."""
        return blocks.changed(weight, self._type_of(weight))

    def held(self, weight: PackedWeight) -> Tensor:
        """Return the weight as llama.cpp computes it, float32 [O, I]."""
        return blocks.held(weight, self._type_of(weight))

    def nearest(self, model: PackedModel) -> str:
        """Say what GGUF would hold exactly."""
        return f"{model.spec.widths} bits on the symmetric grid (--quant.symmetric true)"

    def size(self, model: PackedModel, choices: Choices) -> int:
        """Return the bytes of all tensors, and of the vocabulary about."""
        tensors = language_tensors(model, choices) + (vision_tensors(model) if sees(model) else [])
        return sum(one.bytes + _ALIGNMENT for one in tensors) + 64 * int(model.text_config.vocab_size)

    def write(self, model: PackedModel, folder: Path, choices: Choices) -> list[str]:
        """Write the language model, and what sees, where there is any; return how they are used."""
        file = folder / f"{Path(model.manifest.source).name}-{model.spec.name}.gguf"
        kinds = Counter(self._type_of(weight) for weight in model.weights.values())
        keys = _general(model, kinds.most_common(1)[0][0]) | size_keys(model.text_config, family_of(model))
        keys |= token_keys(model, model.text_config.vocab_size)
        write_file(file, family_of(model).name, keys, language_tensors(model, choices))
        words = f"-m {file.name}"
        if sees(model):
            second = folder / f"mmproj-{file.name}"
            write_file(second, "clip", vision_keys(model), vision_tensors(model))
            words += f" --mmproj {second.name}"
        return _usage(words, kinds, choices)

    def _type_of(self, weight: PackedWeight) -> BlockType:
        found = block_type(weight)
        if found is None:
            raise ExportError(
                where=f"--to gguf, {weight.name}",
                given=f"{weight.spec.name}, {weight.in_features} inputs",
                allowed="8 bits on the symmetric grid; 2, 3 and 4 bits in groups that are multiples of 32",
                do="quantize the model so: --quant.symmetric true, --quant.group_size 64",
            )
        return found


FORM = GGUF()


def _general(model: PackedModel, kind: BlockType) -> dict[str, Any]:
    source = model.manifest.source
    return {
        "general.type": "model",
        "general.name": f"{Path(source).name} {model.spec.name}",
        "general.base_model.count": 1,
        "general.base_model.0.name": Path(source).name,
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": 2,
        "general.quantized_by": "eqat-mm",
    }


def _usage(words: str, kinds: Iterable[BlockType], choices: Choices) -> list[str]:
    """Return how the files are used, and what is in them."""
    return [
        "```sh",
        f"llama-server {words}      # llama.cpp v0.5.0 or newer",
        "```",
        "",
        f"Quantized linears are {' and '.join(kind.name for kind in kinds)}. Embedding and head are "
        f"{choices.embedding.upper()}, rounded from the checkpoint's numbers; all other numbers keep theirs.",
    ]
