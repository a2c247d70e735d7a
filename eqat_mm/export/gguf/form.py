"""GGUF: what it holds, and the writing of it, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eqat_mm.errors import ConfigError, ExportError
from eqat_mm.export.form import Choices
from eqat_mm.export.gguf import blocks
from eqat_mm.export.gguf.blocks import Q2_0, Q4_0, Q4_1, Q8_0, BlockType, block_type
from eqat_mm.export.gguf.names import gguf_name, of_vision, row_order
from eqat_mm.export.gguf.settings import Family, family_of, head_dim, require_rope, rope_factors, size_keys
from eqat_mm.export.gguf.tokens import token_keys
from eqat_mm.export.opened import PackedModel, PackedWeight
from eqat_mm.runtime.files import atomic_path
from eqat_mm.runtime.progress import progress

_F32, _F16 = 0, 1
_FILE_TYPES = {Q4_0: 2, Q4_1: 3, Q8_0: 7, Q2_0: 41}
_ALIGNMENT = 32


@dataclass(frozen=True)
class Planned:
    """One tensor of a GGUF file.

    Attributes:
        name: in the file.
        shape: of its values, the innermost last.
        kind: number of its type.
        bytes: of it.
        make: returns them, uint8 of any shape.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    bytes: int
    make: Callable[[], Tensor]


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

    def changed(self, weight: PackedWeight) -> Tensor:
        """Return the groups whose step size or offset half precision does not hold, bool [O, G]."""
        return blocks.changed(weight, self._type_of(weight))

    def held(self, weight: PackedWeight) -> Tensor:
        """Return the weight as llama.cpp computes it, float32 [O, I]."""
        return blocks.held(weight, self._type_of(weight))

    def nearest(self, model: PackedModel) -> str:
        """Say what GGUF would hold exactly."""
        return f"{model.spec.bits} bits on the symmetric grid (--quant.symmetric true)"

    def size(self, model: PackedModel, choices: Choices) -> int:
        """Return the bytes of all tensors, and of the vocabulary about."""
        words = 64 * int(model.text_config.vocab_size)
        return sum(one.bytes + _ALIGNMENT for one in planned(model, choices)) + words

    def write(self, model: PackedModel, folder: Path, choices: Choices) -> list[str]:
        """Write the language model; return how it is used."""
        file = folder / f"{Path(model.manifest.source).name}-{model.spec.name}.gguf"
        kind = block_type(next(iter(model.weights.values())))
        assert kind is not None, "refused before"
        keys = _general(model, kind) | size_keys(model.text_config, family_of(model))
        keys |= token_keys(model, model.text_config.vocab_size)
        write_file(file, family_of(model).name, keys, planned(model, choices))
        return [
            "```sh",
            f"llama-cli -m {file.name}      # llama.cpp v0.5.0 or newer",
            f"llama-server -m {file.name}",
            "```",
            "",
            f"Quantized linears are {kind.name}; embedding and head are {choices.embedding.upper()}, rounded from the "
            "checkpoint's; norms are F32.",
        ]

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


def planned(model: PackedModel, choices: Choices) -> list[Planned]:
    """Return the tensors of the language model in the order of the file: embedding first, then block by block."""
    family, width = family_of(model), head_dim(model.text_config)
    made = [_packed(weight, family, width) for weight in model.weights.values()]
    tied = bool(model.text_config.tie_word_embeddings or model.config.get("tie_word_embeddings"))
    for name in model.others:
        if not of_vision(name) and not (tied and name == "lm_head.weight"):
            made.append(_other(model, name, family, width, choices))
    factors = rope_factors(model.text_config)
    if factors is not None:
        shape, size = tuple(factors.shape), factors.nbytes
        made.append(Planned("rope_freqs.weight", shape, _F32, size, lambda: _as_bytes(factors)))
    return sorted(made, key=lambda one: _place(one.name))


def _place(name: str) -> tuple[int, str]:
    first, _, rest = name.partition(".")
    return (int(rest.partition(".")[0]), name) if first == "blk" else (-1, name)


def _packed(weight: PackedWeight, family: Family, width: int) -> Planned:
    kind, rows = block_type(weight), weight.out_features
    assert kind is not None, "refused before"
    order = row_order(weight.name, rows, width) if family.turned else None
    name = gguf_name(f"{weight.name}.weight")
    assert name is not None, "refused before"
    shape, size = (rows, weight.in_features), rows * kind.row_bytes(weight.in_features)
    return Planned(name, shape, kind.number, size, lambda: blocks.packed(weight, kind, order))


def _other(model: PackedModel, name: str, family: Family, width: int, choices: Choices) -> Planned:
    """Plan a tensor that is not quantized: a matrix, which is embedding or head, or a vector."""
    header = model.source.by_name[name][0]
    shape, own = header.shape, gguf_name(name)
    assert own is not None, "refused before"
    order = row_order(name, shape[0], width) if family.turned else None

    def read() -> Tensor:
        value = model.source.read(name)
        return value if order is None else value[order]

    if len(shape) < 2:
        return Planned(own, shape, _F32, shape[0] * 4, lambda: _as_bytes(read().to(torch.float32)))
    if choices.embedding == "q8_0" and shape[1] % Q8_0.columns == 0:
        size = shape[0] * Q8_0.row_bytes(shape[1])
        return Planned(own, shape, Q8_0.number, size, lambda: blocks.q8_0(read()))
    return Planned(own, shape, _F16, shape[0] * shape[1] * 2, lambda: _as_bytes(read().to(torch.float16)))


def _as_bytes(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.uint8)


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


def write_file(path: Path, arch: str, keys: dict[str, Any], tensors: list[Planned]) -> None:
    """Write a GGUF file, a tensor in memory at a time.

    Args:
        path: of the file.
        arch: of llama.cpp.
        keys: key -> value, of Python's types: see `_add`.
        tensors: in the order of the file.
    """
    writer = import_module("gguf").GGUFWriter(None, arch)
    for key, value in keys.items():
        _add(writer, key, value)
    for one in tensors:  # the dtype counts only where the type is left open; the package need not know its number
        writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), one.bytes, one.kind)
    with atomic_path(path) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one in progress(tensors, what=f"write {path.name}", total=len(tensors), unit="tensor"):
            writer.write_tensor_data(one.make().contiguous().numpy())
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a key: text, a truth value, an unsigned whole number, a single-precision one, or a list of one of these."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)
