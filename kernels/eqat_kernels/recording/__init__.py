"""One run of a function over fixed tensors, recorded, and made again without Python: a CUDA graph for a CPU.

A decode step of a small model spends more time in Python and in torch's dispatch than in its products. Every op of
torch and every call of our C library is recorded with its tensors; all results are kept, so each has its place, and
views of them stay what they are. Made again, calls that have a translation into C (`steps`) run as one list; what has
none is called as it was, and its result copied to its place.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eqat_kernels.cpu_library import Argument, listening, replayed
from eqat_kernels.recording.steps import CCall, TorchCall, translated

READS_VALUES = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal")
"""Ops whose result Python decides by: a recording would decide as it did once."""


class Recording:
    """A recorded run; calling it makes the run again, on what the same tensors hold by then.

    Args:
        run: reads and writes tensors of a CPU that stay where they are; no gradients. It runs once, for real.

    Attributes:
        result: what the run returned; made again, its tensors hold the new values.

    Raises:
        RuntimeError: the run decides by the values of tensors.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        recorder = _Recorder()
        with listening(recorder.called_c), recorder:
            self.result = run()
        steps = [step for call in recorder.calls for step in _steps(call)]
        self._kept = recorder.calls
        self._parts: list[Callable[[], Any]] = []
        for in_c, group in groupby(steps, lambda step: isinstance(step, tuple)):
            part = list(group)
            self._parts += [replayed(part)] if in_c else part

    def __call__(self) -> None:
        """Make the run again."""
        for part in self._parts:
            part()


class _Recorder(TorchDispatchMode):
    """Keeps every call, in order: of torch, and of the C library, which torch does not see."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[TorchCall | CCall] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.overloadpacket.__name__ in READS_VALUES:
            raise RuntimeError(f"{op} lets Python decide by the values of a tensor")
        result = op(*args, **(kwargs or {}))
        self.calls.append(TorchCall(op, args, kwargs or {}, result))
        return result

    def called_c(self, function: str, arguments: tuple[Argument, ...]) -> None:
        """Keep a call of the C library."""
        self.calls.append((function, arguments))


def _steps(call: TorchCall | CCall) -> list[Any]:
    """Return what has to be done to make a call again: calls of C, or a function of Python, or nothing."""
    if isinstance(call, tuple):
        return [call]
    if not call.op._schema.is_mutable and _stays(call):
        return []
    in_c = translated(call)
    return [call.again] if in_c is None else in_c


def _stays(call: TorchCall) -> bool:
    """Whether a result is a view of an argument, or does not depend on any tensor."""
    given = {_place(leaf) for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)}
    made = {_place(leaf) for leaf in tree_leaves(call.result) if isinstance(leaf, Tensor)}
    return not given or made <= given


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def record(run: Callable[[], Any]) -> Recording:
    """Return the recording of a run; see `Recording`."""
    with torch.no_grad():
        return Recording(run)


__all__ = ["Recording", "record"]
