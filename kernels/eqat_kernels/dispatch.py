"""One visible decision: which implementation of an op runs.

    reference   plain torch, any device and dtype: the specification
    cpu         C, compiled at first use by the machine's own compiler
    triton      one source for all bit widths; on a GPU, or interpreted on the CPU (TRITON_INTERPRET=1) to test it

`auto` takes the fastest one that can run. A choice is logged once per op. Asking for an implementation that does
not exist, or that cannot run on the tensor given, is an error, never a silent fallback.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from eqat_kernels import cpu_library
from eqat_kernels.layout import PackedLayout
from eqat_kernels.tensors import FLOATS

log = logging.getLogger(__name__)

_ALL = ("triton", "cpu", "reference")
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "fake_quantize": _ALL,
    "dequantize": _ALL,
    "quant_linear": _ALL,
    "narrow_linear": ("cpu", "reference"),
    "pack": _ALL,
    "unpack": _ALL,
    "columns": ("triton", "reference"),
    "cached_attention": _ALL,
}
"""Implementations of each op in order of preference."""

_FOLDERS = {"fake_quantize": "fake_quant", "dequantize": "dequant", "pack": "packing", "unpack": "packing"}
_MODULES = {"triton": "triton_impl", "cpu": "cpu_impl", "reference": "reference"}

_auto = os.environ.get("EQAT_KERNELS", "auto")
"""What `auto` means at the moment; `use` changes it."""


def select(
    op: str,
    impl: str,
    tensor: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: PackedLayout | None = None,
) -> str:
    """Return the name of the implementation of `op` to use on `tensor`.

    Args:
        op: a key of `IMPLEMENTATIONS`.
        impl: `auto`, or the name of an implementation. `auto` yields to `use`, and to the environment variable
            `EQAT_KERNELS` as it was at import; an op that has no such implementation takes its reference then.
        tensor: decides by its device.
        dtype: floating-point dtype the op computes in; by default that of `tensor`.
        layout: of the packed weight, for ops that read one.

    Raises:
        ValueError: `impl` does not exist for this op, or cannot run on this tensor; says why.
    """
    if impl == "auto":
        impl = "reference" if _auto in _MODULES and _auto not in IMPLEMENTATIONS[op] else _auto
    return _choose(op, impl, tensor.device, dtype or tensor.dtype, layout)


@contextmanager
def use(impl: str) -> Iterator[None]:
    """Let `auto` mean `impl` inside the block, whatever `EQAT_KERNELS` says."""
    global _auto
    before, _auto = _auto, impl
    try:
        yield
    finally:
        _auto = before


@cache
def _choose(op: str, impl: str, device: torch.device, dtype: torch.dtype, layout: PackedLayout | None) -> str:
    """Decide once: between two products a training step has no time to look around."""
    known = IMPLEMENTATIONS[op]
    if impl == "auto":
        fast = "triton" if device.type == "cuda" else "cpu"
        chosen = "reference" if fast not in known or _obstacle(op, fast, device, dtype, layout) else fast
    elif impl not in known:
        raise ValueError(f"{op}: implementation {impl!r} does not exist; choose one of {('auto', *known)}")
    elif reason := _obstacle(op, impl, device, dtype, layout):
        raise ValueError(f"{op}: implementation {impl!r} cannot run: {reason}; choose another one, or 'auto'")
    else:
        chosen = impl
    _log_once(op, chosen, device.type)
    return chosen


def _obstacle(op: str, impl: str, device: torch.device, dtype: torch.dtype, layout: PackedLayout | None) -> str | None:
    """Say why `impl` cannot run here; None where it can."""
    if impl == "reference":
        return None
    if dtype.is_floating_point and dtype not in FLOATS:
        return f"it computes in {', '.join(map(str, FLOATS))}, not in {dtype}"
    if layout is not None and layout.groups > 1 and layout.group_size % 32:
        return f"groups must be multiples of 32 weights, or one per row, not {layout.group_size}"
    return _cpu_obstacle(op, device, dtype) if impl == "cpu" else _triton_obstacle(device)


def _cpu_obstacle(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"the tensor is on {device}"
    if op == "fake_quantize" and dtype is not torch.float32:
        return f"it trains float32 weights, not {dtype}"
    return cpu_library.obstacle()


def _triton_obstacle(device: torch.device) -> str | None:
    if not _triton_is_installed():
        return "Triton is not installed"
    if device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return f"the tensor is on {device}; Triton needs a GPU, or TRITON_INTERPRET=1 to be tried on the CPU"


@cache
def _triton_is_installed() -> bool:
    try:
        return find_spec("triton") is not None
    except ModuleNotFoundError:
        return False


@cache
def implementation(op: str, name: str) -> Any:
    """Return the module with the implementation `name` of `op`; imported only now, since Triton may be missing."""
    module = importlib.import_module(f"eqat_kernels.{_FOLDERS.get(op, op)}.{_MODULES[name]}")
    return _OnItsDevice(module) if name == "triton" and torch.cuda.device_count() > 1 else module


class _OnItsDevice:
    """A module whose functions run on the GPU of their first tensor: Triton launches on the current one."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        if not callable(function):
            return function

        def run(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            device = first.device
            if device.type != "cuda" or device.index == torch.cuda.current_device():
                return function(first, *args, **kwargs)
            with torch.cuda.device(device):
                return function(first, *args, **kwargs)

        setattr(self, name, run)  # made once
        return run


@cache
def _log_once(op: str, chosen: str, device: str) -> None:
    log.info("%s on %s: %s", op, device, chosen)
