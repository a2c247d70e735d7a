"""Sizes, dtypes and devices of what an op is given, checked before an implementation takes a pointer.

C and Triton read as far as the layout says, whatever a tensor holds. So every op asks here first, once for all its
implementations, and a wrong size is a `ValueError` in place of a read beyond the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eqat_kernels.layout import BITS, PackedLayout, words_for


def check_packed(words: Tensor, scale: Tensor, zero_words: Tensor | None, layout: PackedLayout) -> None:
    """Check the tensors of a packed weight against its layout.

    Raises:
        ValueError: names the tensor, what it is and what the layout asks for.
    """
    rows, groups, device = layout.out_features, layout.groups, words.device
    if words.shape != layout.words_shape or words.dtype is not torch.int32:
        raise _wrong("packed codes", words, layout.words_shape, "int32")
    if scale.shape != (rows, groups) or not scale.is_floating_point() or scale.device != device:
        raise _wrong("step sizes", scale, (rows, groups), f"floating point, on {device}")
    if zero_words is None:
        return
    if zero_words.shape != layout.zeros_shape or zero_words.dtype is not torch.int32 or zero_words.device != device:
        raise _wrong("packed zero points", zero_words, layout.zeros_shape, f"int32, on {device}")


def check_product(x: Tensor, bias: Tensor | None, words: Tensor, layout: PackedLayout) -> None:
    """Check what a packed weight is multiplied with, [..., I], and the bias, [O] or None.

    Raises:
        ValueError: as `check_packed`.
    """
    columns, device = layout.in_features, words.device
    if not x.shape or x.shape[-1] != columns or not x.is_floating_point() or x.device != device:
        raise _wrong("x", x, ("...", columns), f"floating point, on {device}")
    if bias is not None and (bias.shape != (layout.out_features,) or bias.device != device):
        raise _wrong("bias", bias, (layout.out_features,), f"on {device}")


def check_narrow(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check x, [..., I], a weight of 16 bits, [O, I], and the bias, [O] or None.

    Raises:
        ValueError: as `check_packed`.
    """
    device = weight.device
    if weight.dim() != 2 or weight.dtype not in (torch.bfloat16, torch.float16):
        raise _wrong("weight", weight, ("O", "I"), "bfloat16 or float16")
    rows, columns = weight.shape
    if not x.shape or x.shape[-1] != columns or not x.is_floating_point() or x.device != device:
        raise _wrong("x", x, ("...", columns), f"floating point, on {device}")
    if bias is not None and (bias.shape != (rows,) or bias.device != device):
        raise _wrong("bias", bias, (rows,), f"on {device}")


def check_grid(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> None:
    """Check a weight, [O, I], and its step sizes and zero points, [O, G] with I a multiple of G.

    Raises:
        ValueError: as `check_packed`.
    """
    check_bits(bits)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise _wrong("weight", weight, ("O", "I"), "floating point")
    for name, tensor in (("step sizes", scale), ("zero points", zero_point)):
        fits = tensor.dim() == 2 and tensor.shape[0] == weight.shape[0] and tensor.shape == scale.shape
        if not fits or not tensor.is_floating_point() or tensor.device != weight.device:
            raise _wrong(name, tensor, (weight.shape[0], "G"), f"floating point, on {weight.device}")
    if not scale.shape[1] or weight.shape[1] % scale.shape[1]:
        raise ValueError(f"{scale.shape[1]} groups do not divide a row of {weight.shape[1]} weights")


def check_codes(codes: Tensor, bits: int) -> None:
    """Check codes that are to be packed, integers [..., n].

    Raises:
        ValueError: as `check_packed`.
    """
    check_bits(bits)
    if not codes.dim() or codes.is_floating_point():
        raise _wrong("codes", codes, ("...", "n"), "integers")


def check_words(words: Tensor, bits: int, length: int) -> None:
    """Check packed rows of `length` codes, int32 [..., ceil(n * bits / 32)].

    Raises:
        ValueError: as `check_packed`.
    """
    check_bits(bits)
    if not words.dim() or words.shape[-1] != words_for(length, bits) or words.dtype is not torch.int32:
        raise _wrong("packed codes", words, ("...", words_for(length, bits)), "int32")


def check_bits(bits: int) -> None:
    """Check the width of a code.

    Raises:
        ValueError: not one that is packed.
    """
    if bits not in BITS:
        raise ValueError(f"{bits} bits: choose one of {BITS}")


def check_gradient(grad: Tensor, rows: int, columns: int, device: torch.device) -> None:
    """Check the gradient of a result, [rows, columns].

    Raises:
        ValueError: as `check_packed`.
    """
    if grad.shape != (rows, columns) or not grad.is_floating_point() or grad.device != device:
        raise _wrong("gradient", grad, (rows, columns), f"floating point, on {device}")


def check_columns(tiles: dict[str, Tensor], square: Tensor, scale: Tensor, zero_point: Tensor, largest: int) -> None:
    """Check columns that are rounded in turn, [O, B] by name, a square [B, B], and one number per row, [O].

    Raises:
        ValueError: as `check_packed`.
    """
    (name, first), *_ = tiles.items()
    if first.dim() != 2 or not 0 < first.shape[1] <= largest:
        raise _wrong(name, first, ("O", f"1 to {largest}"), "float32")
    rows, columns = first.shape
    for name, tensor in tiles.items():
        if tensor.shape != (rows, columns) or tensor.stride(1) != 1 or not _as(tensor, first):
            raise _wrong(name, tensor, (rows, columns), f"float32, columns next to each other, on {first.device}")
    shapes = {"square": (columns, columns), "step sizes": (rows,), "zero points": (rows,)}
    for (name, shape), tensor in zip(shapes.items(), (square, scale, zero_point), strict=True):
        if tensor.shape != shape or not _as(tensor, first):
            raise _wrong(name, tensor, shape, f"float32, on {first.device}")


def check_cached(query: Tensor, keys: Tensor, values: Tensor, bits: int) -> None:
    """Check queries, float [B, H, Q, D], and rows of keys and values, uint8 [B, K, T, D * bits / 8 + 2], K dividing H.

    Raises:
        ValueError: as `check_packed`.
    """
    if bits not in (4, 8):
        raise ValueError(f"{bits} bits: choose 4 or 8")
    if query.dim() != 4 or not query.is_floating_point() or query.shape[-1] * bits % 8:
        raise _wrong("queries", query, ("B", "H", "Q", "D"), "floating point, D even at 4 bits")
    batch, heads, _, channels = query.shape
    for name, rows in (("keys", keys), ("values", values)):
        shape: tuple[int | str, ...] = (batch, "K", "T", channels * bits // 8 + 2)
        fits = rows.dim() == 4 and rows.shape == keys.shape and rows.shape[0] == batch and rows.shape[3] == shape[3]
        if not fits or not rows.shape[1] or heads % rows.shape[1] or not rows.shape[2]:
            raise _wrong(name, rows, shape, f"uint8, K dividing {heads}")
        if rows.dtype is not torch.uint8 or rows.stride(3) != 1 or rows.device != query.device:
            raise _wrong(name, rows, shape, f"uint8, the bytes of a row next to each other, on {query.device}")


def _as(tensor: Tensor, first: Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.device == first.device


def _wrong(name: str, tensor: Tensor, shape: tuple[int | str, ...], kind: str) -> ValueError:
    wanted = ", ".join(map(str, shape))
    return ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)} on {tensor.device}, not [{wanted}], {kind}")
