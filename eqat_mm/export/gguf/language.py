"""The tensors of a language model as GGUF holds them."""

from __future__ import annotations

from torch import Tensor

from eqat_mm.export.form import Choices
from eqat_mm.export.gguf import blocks
from eqat_mm.export.gguf.blocks import Q8_0, block_type
from eqat_mm.export.gguf.file import F16, F32, Planned, plain
from eqat_mm.export.gguf.names import gguf_name, of_vision, row_order
from eqat_mm.export.gguf.settings import Family, family_of, head_dim, rope_factors
from eqat_mm.export.opened import PackedModel, PackedWeight


def language_tensors(model: PackedModel, choices: Choices) -> list[Planned]:
    """Return the tensors of the language model in the order of the file: embedding first, then block by block."""
    family, width = family_of(model), head_dim(model.text_config)
    made = [_packed(weight, family, width) for weight in model.weights.values()]
    tied = bool(model.text_config.tie_word_embeddings or model.config.get("tie_word_embeddings"))
    for name in model.others:
        if not of_vision(name) and not (tied and name == "lm_head.weight"):
            made.append(_other(model, name, family, width, choices))
    factors = rope_factors(model.text_config)
    if factors is not None:
        made.append(plain("rope_freqs.weight", factors.shape, F32, lambda: factors))
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
        return plain(own, shape, F32, read)
    if choices.embedding == "q8_0" and shape[1] % Q8_0.columns == 0:
        size = shape[0] * Q8_0.row_bytes(shape[1])
        return Planned(own, shape, Q8_0.number, size, lambda: blocks.q8_0(read()))
    return plain(own, shape, F16, read)
