"""Does a file hold what the model wants? Names, shapes and dtypes are compared before a number is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set

import torch
from torch import Tensor, nn

from eqat_mm.checkpoint.layout import PACKED_SUFFIX, SCALE_SUFFIX, SHAPE_SUFFIX
from eqat_mm.checkpoint.shards import Header
from eqat_mm.errors import CheckpointError
from eqat_mm.quant.packed_linear import PackedLinear

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def wanted_tensors(model: nn.Module, *, whole_bytes: bool = False) -> dict[str, Tensor]:
    """Return every tensor that the files of a packed model hold, by its name in the model.

    Args:
        model: packed; what is stored of it may be on the meta device, of tied parameters both are listed.
        whole_bytes: whether weights are stored as `layout.to_bytes` gives them.
    """
    wanted = dict(model.state_dict(keep_vars=True))
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear):
            wanted[path + SCALE_SUFFIX] = torch.empty(
                module.weight_scale.shape, dtype=module.spec.storage_dtype, device="meta"
            )
            if whole_bytes:
                del wanted[path + PACKED_SUFFIX], wanted[path + SHAPE_SUFFIX]
                shape = (module.layout.out_features, module.layout.in_features)
                wanted[f"{path}.weight"] = torch.empty(shape, dtype=torch.int8, device="meta")
    return wanted


def require_match(
    wanted: Mapping[str, Tensor], stored: Mapping[str, Header], where: str, *, spare: Set[str] = frozenset()
) -> None:
    """Check that every wanted tensor is stored, in its shape and dtype, and nothing else.

    Args:
        wanted: tensors by name. What is not on the meta device is there already and need not be stored; floating-point
            tensors may have any dtype of 16 or 32 bits, step sizes and integers only their own.
        stored: headers by name.
        where: the folder or file, for messages.
        spare: names that may be missing.

    Raises:
        CheckpointError: names what is missing, left over or different.
    """
    missing = [name for name, tensor in wanted.items() if tensor.is_meta and name not in stored and name not in spare]
    _refuse(where, "no tensor", missing)
    _refuse(where, "tensors that the model has no place for:", [name for name in stored if name not in wanted])
    wrong = [
        f"{name} {_described(header)} in place of {_described(Header(wanted[name].dtype, tuple(wanted[name].shape)))}"
        for name, header in stored.items()
        if not _fits(name, header, wanted[name])
    ]
    _refuse(where, "", wrong)


def needless(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return the names that a model computes for itself, or whose class says that it ignores them."""
    patterns: Iterable[str] = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    computed = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    return {name for name in names if name in computed or any(re.search(pattern, name) for pattern in patterns)}


def _fits(name: str, header: Header, tensor: Tensor) -> bool:
    exact = not tensor.is_floating_point() or name.endswith(SCALE_SUFFIX)
    same = header.dtype is tensor.dtype if exact else header.dtype in _FLOATS
    return same and header.shape == tuple(tensor.shape)


def _described(header: Header) -> str:
    kind = "of a foreign dtype" if header.dtype is None else str(header.dtype).removeprefix("torch.")
    return f"{kind} {list(header.shape)}"


def _refuse(where: str, what: str, found: list[str]) -> None:
    if found:
        raise CheckpointError(
            where=where,
            given=f"{what} {', '.join(found[:3])}".strip() + (f" and {len(found) - 3} more" if found[3:] else ""),
            allowed="every weight of the model that config.json describes, and nothing else",
            do="copy or make the checkpoint again",
        )
