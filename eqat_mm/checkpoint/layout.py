"""The `quantization_config` of compressed-tensors' formats, as pure functions.

`pack-quantized`: what is in the files for each quantized linear is the state dict of `PackedLinear`. `int-quantized`,
for weights and activations of 8 bits, which is what kernels for them read: whole bytes in place of packed words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from eqat_mm.blocks.arch import Arch
from eqat_mm.blocks.weights import WeightSource
from eqat_mm.errors import CheckpointError, EqatError
from eqat_mm.quant.bit_widths import UNQUANTIZED, BitWidths
from eqat_mm.quant.spec import QuantSpec

PACKED_SUFFIX = ".weight_packed"
SCALE_SUFFIX = ".weight_scale"
SHAPE_SUFFIX = ".weight_shape"
PACKED_LEAVES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
"""Last parts of the names of tensors that stand for the weight of a linear."""
PACKED = "pack-quantized"
BYTES = "int-quantized"
_EVERY = "Linear"
"""Target of a group for all linears. Among several groups engines would prefer it to the parts of a fused layer."""
_BEFORE, _DOT = "re:.*", r"\."
_SIGN = 128
"""The unsigned code of zero at 8 bits; as a mask, the bit that tells signed from unsigned codes."""


def quantization_config(
    spec: QuantSpec,
    ignore: Sequence[str],
    widths: BitWidths | None = None,
    head_dim: int | None = None,
    loose: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the `quantization_config` entry of config.json.

    Args:
        spec: of the quantized linears, resolved.
        ignore: regular expressions (`re:...`) of linears that stay in full precision.
        widths: of activations and KV cache; None where neither is quantized.
        head_dim: channels of one head of a key, where the KV cache is quantized.
        loose: parameters that a module holds which is more than a layer, such as `image_newline`.
    """
    widths = widths or BitWidths(spec.bits)
    targets: dict[int, list[str]] = {} if spec.table else {spec.bits: [_EVERY]}
    for path, bits in sorted(spec.table.items(), key=lambda pair: pair[1]):
        targets.setdefault(bits, []).append(_target(path))
    return {
        "quant_method": "compressed-tensors",
        "format": format_of(widths),
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": theirs,
                "weights": _weights(replace(spec, bits=bits)),
                "input_activations": _dynamic(widths.activations, "token"),
                "output_activations": None,
            }
            for index, (bits, theirs) in enumerate(targets.items())
        },
        "ignore": list(ignore),
        # per token and head: the library's `token` would share one step size among all tokens of a head
        "kv_cache_scheme": _dynamic(widths.kv_cache, "group", head_dim),
        # transformers 5.23 expects unpacked zero points unless it is told to dequantize while it loads; engines ignore
        # the key. That route rounds weights to the dtype of the scales, so the symmetric grid does without, but where a
        # module with parameters of its own is handed outputs of others: compressed-tensors 0.19 and 0.20 turn those
        # into plain dictionaries on the other route, and `generate` fails. That route takes the bits of the first group
        # for those of all, without a word, so mixed bits never take it: asymmetric ones are refused aloud instead.
        **({} if spec.table or (spec.symmetric and not loose) else {"dequantize": True}),
    }


def _weights(spec: QuantSpec) -> dict[str, Any]:
    """Return the scheme of weights."""
    whole_row = spec.group_size == -1
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "channel" if whole_row else "group",
        "group_size": None if whole_row else spec.group_size,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
    }


def _target(path: str) -> str:
    """Return what stands for a linear among the targets of a group: it matches by the end of the path, as `ignore`."""
    return f"{_BEFORE}{path.replace('.', _DOT)}$"


def _path(target: str) -> str:
    return target.removeprefix(_BEFORE).removesuffix("$").replace(_DOT, ".")


def format_of(widths: BitWidths) -> str:
    """Return the format in which linears of these bit widths are stored."""
    return BYTES if widths.weights == widths.activations == 8 else PACKED


def to_bytes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of packed linears of 8 bits as `int-quantized` stores it.

    `X.weight_packed`, int32 [O, ceil(I / 4)], becomes `X.weight`, int8 [O, I] with signed codes; `X.weight_shape` goes.
    """
    stored = {name: tensor for name, tensor in state.items() if not name.endswith((PACKED_SUFFIX, SHAPE_SUFFIX))}
    for name in (name for name in state if name.endswith(PACKED_SUFFIX)):
        module = name.removesuffix(PACKED_SUFFIX)
        _, in_features = state[module + SHAPE_SUFFIX].tolist()
        unsigned = state[name].contiguous().view(torch.uint8)[:, :in_features]
        stored[f"{module}.weight"] = (unsigned ^ _SIGN).contiguous().view(torch.int8)
    return stored


def from_bytes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return `weight_packed` and `weight_shape` of a weight that `to_bytes` gave, int8 [O, I]."""
    unsigned = weight.contiguous().view(torch.uint8) ^ _SIGN
    padded = torch.nn.functional.pad(unsigned, (0, -weight.shape[1] % 4))
    return padded.contiguous().view(torch.int32), torch.tensor(weight.shape)


def _dynamic(bits: int, strategy: str, group_size: int | None = None) -> dict[str, Any] | None:
    """Return a symmetric scheme whose step sizes follow from what is quantized; None at 16 bits."""
    if bits == UNQUANTIZED:
        return None
    scheme = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "group_size": group_size}
    return scheme | {"dynamic": True, "observer": None}


def ignored_linears(arch: Arch, model: nn.Module, source: WeightSource | None = None) -> list[str]:
    """Return regular expressions for the full-precision parts that are linears, or are to others, as routers are.

    They match by the end of the path, because serving engines change the prefix. Linears inside the blocks that the
    adapter does not quantize are among them, and what it keeps.

    Args:
        arch: of the model.
        model: with its experts split.
        source: its weights; where files give a module another name, that is listed, too: some readers use it.
    """
    kept: dict[str, None] = {}  # each once, in order
    for index, block in enumerate(arch.find(model, arch.blocks).children()):
        quantized = set(arch.linears_of(block))
        for path, module in block.named_modules():
            if path in arch.kept or (isinstance(module, nn.Linear) and path not in quantized):
                kept |= dict.fromkeys((path, _stored_path(source, f"{arch.blocks}.{index}", path)))
    parts = [f"re:.*{path}$" for path in kept]
    for part in arch.full_precision_parts(model):
        if part.whole and any(isinstance(module, nn.Linear) for module in part.module.modules()):
            parts.append(f"re:.*{part.path.rpartition('.')[2]}.*")
    return parts


def _stored_path(source: WeightSource | None, block: str, path: str) -> str:
    """Return what published files call a module of a block, inside it."""
    name = f"{block}.{path}.weight"
    if source is None or name not in source:
        return path
    number = block.rpartition(".")[2]
    return source.published_name(name).partition(f".{number}.")[2].removesuffix(".weight") or path


def described(config: dict[str, Any], scale_dtype: torch.dtype | None, where: str) -> tuple[QuantSpec, BitWidths]:
    """Return the spec and the bit widths that a `quantization_config` describes.

    Args:
        config: content of config.json.
        scale_dtype: of the stored step sizes.
        where: the file, for messages.

    Raises:
        CheckpointError: not a format or not integer settings that this package stores.
    """
    entry = config.get("quantization_config")
    try:
        return _described(entry, scale_dtype)
    except (KeyError, TypeError, ValueError, AttributeError, EqatError) as error:
        form = entry.get("format") if isinstance(entry, dict) else None
        reason = f"{error.where} {error.given}" if isinstance(error, EqatError) else f"{error}"
        raise CheckpointError(
            where=where,
            given="no quantization_config" if entry is None else f"format {form!r:.60}, {reason:.120}",
            allowed=f"compressed-tensors {BYTES!r} or {PACKED!r}, with groups that differ in bits alone",
            do="give a folder written by `eqat block-ap` or `eqat e2e-qp`",
        ) from error


def is_as_written(entry: dict[str, Any]) -> bool:
    """Whether a `quantization_config` is one that `quantization_config` returns, of whatever version."""
    try:
        spec, widths = _described(entry, None)
        kept = (entry.get("kv_cache_scheme") or {}).get("group_size")
        return _alike(entry) == _alike(quantization_config(spec, entry["ignore"], widths, kept))
    except (KeyError, TypeError, ValueError, AttributeError, EqatError):
        return False


def _alike(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry without what some versions write, and others do not."""
    groups = {
        name: {key: value for key, value in group.items() if key != "format"}
        for name, group in entry["config_groups"].items()
    }
    return {key: value for key, value in entry.items() if key != "dequantize"} | {"config_groups": groups}


def _described(entry: Any, scale_dtype: torch.dtype | None) -> tuple[QuantSpec, BitWidths]:
    if entry["format"] not in (PACKED, BYTES):
        raise ValueError("which is read by others")
    groups = list(entry["config_groups"].values())
    specs = [_spec_of(group, scale_dtype) for group in groups]
    spec = min(specs, key=lambda each: each.bits)
    named = [(target, each.bits) for each, group in zip(specs, groups, strict=True) for target in group["targets"]]
    if any(target.startswith(_BEFORE) for target, _ in named):
        spec = replace(spec, allocation={_path(target): bits for target, bits in named})
    elif len(groups) > 1:
        raise ValueError(f"{len(groups)} groups")
    if any(replace(each, bits=spec.bits) != replace(spec, allocation=None) for each in specs):
        raise ValueError("groups that differ")
    schemes = [{"num_bits": spec.bits}, groups[0].get("input_activations"), entry.get("kv_cache_scheme")]
    widths = BitWidths(*(UNQUANTIZED if scheme is None else scheme["num_bits"] for scheme in schemes))
    if (entry["format"] == BYTES) != (format_of(widths) == BYTES):
        raise ValueError(f"at {widths.name}")
    return spec, widths


def _spec_of(group: dict[str, Any], scale_dtype: torch.dtype | None) -> QuantSpec:
    weights = group["weights"]
    return QuantSpec(
        bits=weights["num_bits"],
        group_size=weights["group_size"] or -1,
        symmetric=weights["symmetric"],
        scale_dtype="float16" if scale_dtype is torch.float16 else "bfloat16",
    )
