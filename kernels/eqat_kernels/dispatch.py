"""One visible decision: which implementation of an op runs.

`auto` takes the fastest implementation that exists for the tensor's device. A choice is logged once per
op; asking for an implementation that does not exist is an error, never a silent fallback.
"""

from __future__ import annotations

import logging
import os
from functools import cache

import torch

log = logging.getLogger(__name__)

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "fake_quantize": ("reference",),
    "dequantize": ("reference",),
    "quant_linear": ("reference",),
}
"""Implementations of each op in order of preference."""


def select(op: str, impl: str, tensor: torch.Tensor) -> str:
    """Return the name of the implementation of `op` to use on `tensor`.

    Args:
        op: a key of `IMPLEMENTATIONS`.
        impl: `auto`, or the name of an implementation. `auto` yields to the environment variable
            `EQAT_KERNELS` where it is set.
        tensor: decides by its device.

    Raises:
        ValueError: `impl` does not exist for this op.
    """
    if impl == "auto":
        impl = os.environ.get("EQAT_KERNELS", "auto")
    known = IMPLEMENTATIONS[op]
    chosen = known[0] if impl == "auto" else impl
    if chosen not in known:
        raise ValueError(f"{op}: implementation {impl!r} does not exist; choose one of {('auto', *known)}")
    _log_once(op, chosen, tensor.device.type)
    return chosen


@cache
def _log_once(op: str, chosen: str, device: str) -> None:
    log.info("%s on %s: %s", op, device, chosen)
