"""Ops of torch on a few rows of float32 as calls of `c/steps.c`. What is not here is called from Python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from eqat_kernels.cpu_library import Argument

aten = torch.ops.aten
CCall = tuple[str, tuple[Argument, ...]]
DIMENSIONS = 4


@dataclass
class TorchCall:
    """A call of an op of torch, with what it returned."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    def again(self) -> None:
        """Make the call again; a new result is copied to the place of the first one."""
        found = self.op(*self.args, **self.kwargs)
        if not self.op._schema.is_mutable:
            for place, value in zip(tree_leaves(self.result), tree_leaves(found), strict=True):
                place.copy_(value)


class _Strides(ctypes.Structure):
    """`Strides` of the C source."""

    _fields_ = tuple((name, ctypes.c_int64 * DIMENSIONS) for name in ("sizes", "out", "a", "b"))


class _Attention(ctypes.Structure):
    """`Attention` of the C source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "queries", "tokens", "channels")),
        *((name, ctypes.c_int64 * 3) for name in ("q", "k", "v", "out")),
        ("mask", ctypes.c_int64 * 4),
        ("scale", ctypes.c_double),
    )


def translated(call: TorchCall) -> list[CCall] | None:
    """Return calls of C that do what a call of torch does; None where there are none."""
    translate = _TRANSLATIONS.get(call.op)
    return translate(call) if translate else None


def _elementwise(function: str, a: Any, b: Any, result: Tensor) -> list[CCall] | None:
    """Return a call for `result` from `a` and `b`, tensors or numbers."""
    a, b = (value if isinstance(value, Tensor) else torch.tensor(float(value)) for value in (a, b))
    if not all(_is_float(tensor) for tensor in (a, b, result)) or result.dim() > DIMENSIONS:
        return None
    sizes = [1] * (DIMENSIONS - result.dim()) + list(result.shape)
    strides = (tensor.expand(result.shape).stride() for tensor in (result, a, b))
    shapes = [[0] * (DIMENSIONS - result.dim()) + list(stride) for stride in strides]
    return [(function, (_Strides(*(tuple(numbers) for numbers in (sizes, *shapes))), a, b, result))]


def _is_float(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.device.type == "cpu"


def _sum(call: TorchCall) -> list[CCall] | None:
    a, b = call.args
    if call.kwargs:
        return None
    if call.result.dtype is torch.int64 and call.result.numel() == 1:
        number = b if isinstance(b, Tensor) else torch.tensor(b)
        whole = a.dtype is torch.int64 and number.dtype is torch.int64
        return [("number_sum_of", (a, number, call.result))] if whole else None
    return _elementwise("sum_of", a, b, call.result)


def _product(call: TorchCall) -> list[CCall] | None:
    a, b = call.args
    return _elementwise("product_of", a, b, call.result)


def _square(call: TorchCall) -> list[CCall] | None:
    base, exponent = call.args
    return _elementwise("product_of", base, base, call.result) if exponent == 2 else None


def _of_one(function: str, factor: float = 1.0) -> Callable[[TorchCall], list[CCall] | None]:
    return lambda call: _elementwise(function, call.args[0], factor, call.result)


def _mean(call: TorchCall) -> list[CCall] | None:
    a, dims = call.args[0], list(call.args[1] or [])
    if call.kwargs or dims not in ([-1], [a.dim() - 1]) or not (_is_float(a) and a.is_contiguous()):
        return None
    return [("mean_of", (a, call.result, call.result.numel(), a.shape[-1]))]


def _joined(call: TorchCall) -> list[CCall] | None:
    parts, dim = call.args[0], call.args[1] if len(call.args) > 1 else 0
    steps, start = list[CCall](), 0
    for part in parts:
        step = _elementwise("product_of", part, 1.0, call.result.narrow(dim, start, part.shape[dim]))
        if step is None:
            return None
        steps += step
        start += part.shape[dim]
    return steps


def _put(call: TorchCall) -> list[CCall] | None:
    to, dim, index, source = call.args
    if index.numel() != 1 or index.dtype is not torch.int64:
        return None
    copy = _elementwise("product_of", source, 1.0, to.narrow(dim, 0, 1))
    return copy and [("put_at", (*copy[0][1], index, to.stride(dim)))]


def _attention(call: TorchCall) -> list[CCall] | None:
    query, keys, values, *rest = call.args
    mask: Any = rest[0] if rest else call.kwargs.get("attn_mask")
    tensors = (query, keys, values, mask, call.result)
    if rest[1:] or call.kwargs.keys() - {"scale", "attn_mask"} or keys.shape[:2] != query.shape[:2]:
        return None
    if any(not isinstance(each, Tensor) or not _is_float(each) or each.dim() != DIMENSIONS for each in tensors):
        return None
    if any(each.stride(3) != 1 for each in (query, keys, values, call.result)) or values.shape != keys.shape:
        return None
    (batch, heads, queries, channels), tokens = query.shape, keys.shape[2]
    scale = call.kwargs.get("scale") or channels**-0.5
    rows = [tuple(each.stride()[:3]) for each in (query, keys, values, call.result)]
    of_mask = tuple(mask.expand(batch, heads, queries, tokens).stride())
    shape = _Attention(batch, heads, queries, tokens, channels, *rows, of_mask, scale)
    room = torch.empty(batch * heads, tokens)
    return [("attend_floats", (shape, query, keys, values, mask, room, call.result))]


_TRANSLATIONS: dict[Any, Callable[[TorchCall], list[CCall] | None]] = {
    aten.add.Tensor: _sum,
    aten.add_.Tensor: _sum,
    aten.mul.Tensor: _product,
    aten.pow.Tensor_Scalar: _square,
    aten.neg.default: _of_one("product_of", -1.0),
    aten.rsqrt.default: _of_one("inverse_root_of"),
    aten.silu.default: _of_one("silu_of"),
    aten.mean.dim: _mean,
    aten.cat.default: _joined,
    aten.index_copy_.default: _put,
    aten.scaled_dot_product_attention.default: _attention,
}
