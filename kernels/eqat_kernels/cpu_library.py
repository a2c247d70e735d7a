"""Compiles the C sources in `c/` with the machine's own compiler at first use, and calls the library.

The library is kept in `$EQAT_CACHE/kernels` (by default `~/.cache/eqat-mm/kernels`) under a hash of sources, compiler,
flags and processor, so a folder shared by different machines is no danger. It takes a few seconds, once. Where there
is no compiler, `obstacle` says so and the references are used.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eqat_kernels.layout import PackedLayout

log = logging.getLogger(__name__)

FOLDER = Path(__file__).with_name("c")
SOURCES = sorted(FOLDER.glob("*.[ch]"))
FLAGS = (
    *("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    "-fno-math-errno",  # lets rintf and comparisons be vectorized; values stay those of IEEE arithmetic
    "-fno-trapping-math",
    *(("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()),
)


class Packed(ctypes.Structure):
    """`Packed` of the C source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("words", "end", "zeros")),
        *((name, ctypes.c_int64) for name in ("columns", "groups", "row_words", "first", "last")),
    )


def packed(words: Tensor, zeros: Tensor | None, layout: PackedLayout, rows: range) -> Packed:
    """Describe some rows of a packed weight. The tensors are contiguous and outlive the description."""
    start, zero_start = words.data_ptr(), None if zeros is None else zeros.data_ptr()
    end = start + 4 * words.numel()
    return Packed(start, end, zero_start, layout.in_features, layout.groups, words.shape[1], rows.start, rows.stop)


class Cache(ctypes.Structure):
    """`Cache` of the C source."""

    _fields_ = (
        ("first", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("of_batch", "of_head", "of_token", "bytes", "half")),
    )


def weight_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what the C source reads and writes a dense weight in: bfloat16 as it is, all else through float32."""
    return dtype if dtype is torch.bfloat16 else torch.float32


Argument = int | Tensor | ctypes.Structure | None
MOST = 12
"""Arguments of a call that is replayed, the number of threads among them."""

_listener: Callable[[str, tuple[Argument, ...]], None] | None = None


def call(function: str, *arguments: Argument) -> None:
    """Run a function of the library on torch's number of threads; tensors are passed as pointers, None as null."""
    _function(function, len(arguments))(*map(_number, arguments), torch.get_num_threads())
    if _listener is not None:
        _listener(function, arguments)


def _number(argument: Argument) -> int:
    if isinstance(argument, int):
        return argument
    if isinstance(argument, ctypes.Structure):
        return ctypes.addressof(argument)
    return 0 if argument is None else argument.data_ptr()


@contextmanager
def listening(listener: Callable[[str, tuple[Argument, ...]], None]) -> Iterator[None]:
    """Tell `listener` of every call inside the block, behind it."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


class _Call(ctypes.Structure):
    _fields_ = (("function", ctypes.c_void_p), ("numbers", ctypes.c_int64 * MOST))


def replayed(calls: Sequence[tuple[str, tuple[Argument, ...]]]) -> Callable[[], None]:
    """Return what makes these calls again, in one call from Python; it keeps what they point at."""
    library, reason = _load()
    assert library is not None, reason
    array = (_Call * len(calls))()
    for place, (name, arguments) in zip(array, calls, strict=True):
        numbers = (*map(_number, arguments), torch.get_num_threads())
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        place.function, place.numbers[: len(numbers)] = address, numbers
    return partial(_replay, list(calls), array)


def _replay(calls: list[Any], array: Any) -> None:
    _function("replay", 1)(ctypes.addressof(array), len(calls))


@cache
def _function(name: str, arguments: int) -> Callable[..., None]:
    """Return a function of the library that takes whole numbers, pointers among them, and a number of threads."""
    library, reason = _load()
    assert library is not None, reason
    function = getattr(library, name)
    function.argtypes, function.restype = [ctypes.c_int64] * (arguments + 1), None
    return function  # type: ignore[no-any-return]


def obstacle() -> str | None:
    """Say why the library cannot be used on this machine; None where it can."""
    return _load()[1]


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """Return the library, or the reason why there is none; a reason is logged once."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        reason = "there is no C compiler (cc, gcc, clang or $CC)"
    else:
        try:
            return ctypes.CDLL(str(_compiled(compiler))), None
        except subprocess.CalledProcessError as error:
            reason = f"{compiler} could not compile {FOLDER}: {error.stderr.strip()[:500]}"
        except OSError as error:
            reason = f"the library compiled by {compiler} cannot be used: {error}"
    log.warning("no compiled CPU kernels, the torch references are used: %s", reason)
    return None, reason


def _compiled(compiler: str) -> Path:
    """Return the path of the compiled library; compile it unless it is there."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    identity = "\0".join((*(source.read_text("utf-8") for source in SOURCES), version, *FLAGS, _processor()))
    folder = Path(os.environ.get("EQAT_CACHE") or "~/.cache/eqat-mm").expanduser() / "kernels"
    path = folder / f"cpu_library-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = Path(temporary) / path.name
            compiled = [str(source) for source in SOURCES if source.suffix == ".c"]
            command = [compiler, *FLAGS, *compiled, "-o", str(built), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            built.replace(path)  # whole or not at all: several processes may do this at once
    return path


def _processor() -> str:
    """Return what `-march=native` depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {features}"
