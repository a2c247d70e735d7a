"""eqat-mm: quantization-aware training that makes 2- to 4-bit language and vision-language models.

`eqat_mm.load(folder)` returns the packed model of a checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eqat_mm.checkpoint.read import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from eqat_mm.checkpoint.read import load

        return load
    raise AttributeError(f"module 'eqat_mm' has no attribute {name!r}")
