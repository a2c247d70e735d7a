"""GGUF files, by the package `gguf` and its own dequantization; the 2-bit blocks that it does not know yet by numpy."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eqat_mm.verify.formats.part import Part
from eqat_mm.verify.held import unpacked
from eqat_mm.verify.slabs import Array

_Q2_0, _Q2_0_COLUMNS, _Q2_0_BYTES = 42, 64, 18
_EXACT = ("F32", "Q4_0", "Q4_1", "Q2_0")
_SEEING = "mmproj"
"""Begins the name of the file of vision tower and projector."""
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
_VISION = {
    "v.class_embd": "vision_tower.vision_model.embeddings.class_embedding",
    "v.patch_embd": "vision_tower.vision_model.embeddings.patch_embedding",
    "v.position_embd": "vision_tower.vision_model.embeddings.position_embedding",
    "v.pre_ln": "vision_tower.vision_model.pre_layrnorm",
    "mm.0": "multi_modal_projector.linear_1",
    "mm.2": "multi_modal_projector.linear_2",
}
_IN_LAYER = {
    **{f"ln{number}": f"layer_norm{number}" for number in (1, 2)},
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    "attn_out": "self_attn.out_proj",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}


def parts(folder: Path) -> Iterator[Part]:
    """Yield every tensor, under published names; rows of query and key in the order of transformers.

    Raises:
        ValueError: another number of files than one language model, and at most one for what sees.
    """
    _teach()
    files = sorted(folder.glob("*.gguf"))
    seeing = [path for path in files if path.name.startswith(_SEEING)]
    if len(files) - len(seeing) != 1 or seeing[1:]:
        raise ValueError(f"{len(files)} GGUF files, {len(seeing)} of them for images")
    for path in files:
        reader: Any = import_module("gguf").GGUFReader(path)
        yield from _seeing(reader) if path in seeing else _language(reader, "language_model." * len(seeing))


def _language(reader: Any, prefix: str) -> Iterator[Part]:
    turned = str(reader.fields["general.architecture"].contents()) == "llama"
    for tensor in reader.tensors:
        name = _name(tensor.name)
        if name is None:
            continue
        values = _values(tensor)
        if turned and ("attn_q." in tensor.name or "attn_k." in tensor.name):
            values = _turned_back(values, _heads(reader, tensor.name))
        yield Part(prefix + name, values, _slack(_kind(tensor), values))


def _seeing(reader: Any) -> Iterator[Part]:
    for tensor in reader.tensors:
        module, _, leaf = tensor.name.rpartition(".")
        if tensor.name in _VISION:  # a parameter of its own
            yield Part(_VISION[tensor.name], _values(tensor))
        elif module in _VISION:
            yield Part(f"{_VISION[module]}.{leaf}", _values(tensor))
        else:
            _, _, number, inside = module.split(".")
            layer = f"vision_tower.vision_model.encoder.layers.{number}"
            yield Part(f"{layer}.{_IN_LAYER[inside]}.{leaf}", _values(tensor))


def _teach() -> None:
    """Let the package read files with 2-bit blocks: it needs their size alone."""
    constants: Any = import_module("gguf.constants")
    if _Q2_0 in {int(kind) for kind in constants.GGMLQuantizationType}:
        return
    kinds = constants.GGMLQuantizationType
    added = int.__new__(kinds, _Q2_0)
    added._name_, added._value_ = "Q2_0", _Q2_0
    kinds._value2member_map_[_Q2_0] = added
    kinds._member_map_["Q2_0"] = added
    constants.GGML_QUANT_SIZES[added] = (_Q2_0_COLUMNS, _Q2_0_BYTES)


def _kind(tensor: Any) -> str:
    return str(tensor.tensor_type.name)


def _values(tensor: Any) -> NDArray[np.float32]:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if _kind(tensor) == "Q2_0":
        return _two_bits(tensor.data).reshape(shape)
    dense: NDArray[np.float32] = import_module("gguf.quants").dequantize(tensor.data, tensor.tensor_type)
    return dense.astype(np.float32).reshape(shape)


def _two_bits(data: Array) -> NDArray[np.float32]:
    """Return (c - 1) d of blocks of 64: d in half precision, then the codes c, four in a byte."""
    blocks = np.ascontiguousarray(data).view(np.uint8).reshape(-1, _Q2_0_BYTES)
    d = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    return (unpacked(blocks[:, 2:], 2, _Q2_0_COLUMNS).astype(np.float32) - 1) * d


def _slack(kind: str, values: Array) -> Array | float:
    """Return how far each value may be from what was rounded: half a step of its block, and that step in 16 bits."""
    if kind in _EXACT or values.ndim < 2:
        return 0.0
    if kind == "F16":
        return np.abs(values) * 2.0**-10 + 2.0**-24
    largest = np.abs(values).reshape(len(values), -1, 32).max(-1)
    return np.repeat(largest / 127 * (0.5 + 127 * 2.0**-11) + 1e-12, 32, 1)


def _name(tensor: str) -> str | None:
    """Return what the model calls a tensor; None of what is no weight, such as tables of rotary embeddings."""
    module, _, leaf = tensor.rpartition(".")
    if module in _WHOLE:
        return f"{_WHOLE[module]}.{leaf}"
    stack, _, rest = module.partition(".")
    number, _, inside = rest.partition(".")
    return f"model.layers.{number}.{_IN_BLOCK[inside]}.{leaf}" if stack == "blk" else None


def _turned_back(values: Array, heads: int) -> NDArray[np.float32]:
    """Return rows in the order of transformers, where the two halves of a head are turned against each other."""
    back: NDArray[np.float32] = values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    return back


def _heads(reader: Any, name: str) -> int:
    key = "head_count" if "attn_q." in name else "head_count_kv"
    return int(reader.fields[f"llama.attention.{key}"].contents())
