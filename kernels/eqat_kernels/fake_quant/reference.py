"""Fake quantization with straight-through gradients, in plain torch.

With u = W / s, zr = round(z), level = clamp(round(u) + zr, 0, Q) - zr, Q = 2^N - 1 (elementwise, s and z per
group):

    W_hat   = level * s
    inside  = (level == round(u))
    dW      = dW_hat * inside
    ds      = sum over the group of dW_hat * (level - inside * u)
    dz      = sum over the group of dW_hat * (-s) * (1 - inside)

which is the table of EfficientQAT's per-element gradients written without cases. The backward recomputes u
from W, s and z, so nothing of the size of W is kept between the passes.

Both passes go through W in slices of rows small enough for a core's cache: the ten elementwise operations then
read and write the cache, and temporaries never have the size of W.

Shape letters: O output rows (of a slice), G groups, g group size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from eqat_kernels.levels import round_to_levels

SLICE = 1 << 18
"""Elements of W handled at a time: 1 MiB in float32, a common second-level cache."""


def forward(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Return W_hat [O, I], computed in the dtype of W and rounded to `dtype`; see `eqat_kernels.fake_quantize`."""
    top = (1 << bits) - 1
    result = torch.empty_like(weight)
    for w_OGg, s_OG1, z_OG1, out_OGg in _slices(weight, scale, zero_point, result):
        torch.div(w_OGg, s_OG1, out=out_OGg)
        round_to_levels(out_OGg, z_OG1, top).mul_(s_OG1)
    return result.to(dtype)


def backward(
    grad: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, grad_w: Tensor, *, remake: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Write dW and return ds, dz and, on request, W_hat again.

    Args:
        grad: dW_hat, float [O, I].
        weight: W, float [O, I].
        scale: s, float [O, G].
        zero_point: z, float [O, G].
        bits: N.
        grad_w: contiguous, of the shape and dtype of W, for dW; may be `grad`.
        remake: whether W_hat is made again, in the dtype of `grad`.

    Returns:
        ds and dz [O, G], in the dtype of W; W_hat [O, I] or None.
    """
    top = (1 << bits) - 1
    result = forward(weight, scale, zero_point, bits, grad.dtype) if remake else None
    grad = grad.to(weight.dtype)
    grads_s, grads_z = [], []
    for w_OGg, s_OG1, z_OG1, grad_OGg, grad_w_OGg in _slices(weight, scale, zero_point, grad, grad_w):
        u_OGg = w_OGg / s_OG1
        level_OGg = round_to_levels(u_OGg.clone(), z_OG1, top)
        inside_OGg = u_OGg.round().eq_(level_OGg)  # 1.0 or 0.0: products with a bool tensor are several times slower
        slope_OGg = level_OGg.sub_(u_OGg.mul_(inside_OGg))
        grads_s.append(slope_OGg.mul_(grad_OGg).sum(-1))
        total_OG = grad_OGg.sum(-1)
        torch.mul(grad_OGg, inside_OGg, out=grad_w_OGg)
        grads_z.append((grad_w_OGg.sum(-1) - total_OG).mul_(s_OG1.squeeze(-1)))
    return torch.cat(grads_s), torch.cat(grads_z), result


def _slices(weight: Tensor, scale: Tensor, zero_point: Tensor, *like_weight: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield slices of rows: W [O, G, g], s and round(z) [O, G, 1], and further tensors of W's shape [O, G, g]."""
    rows = max(1, SLICE // weight.shape[1])
    groups = scale.shape[1]
    for at in range(0, weight.shape[0], rows):
        part = slice(at, at + rows)
        per_group = (scale[part].unsqueeze(-1), zero_point[part].round().unsqueeze(-1))
        w_OGg, *others = (tensor[part].unflatten(1, (groups, -1)) for tensor in (weight, *like_weight))
        yield (w_OGg, *per_group, *others)
