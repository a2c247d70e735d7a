"""eqat-mm: quantization-aware training that makes 2- to 4-bit language and vision-language models.

    from eqat_mm import evaluate, load, quantize, tune

    model = quantize("llava-hf/llava-1.5-7b-hf", bits=3, group_size=64, text="texts/", output="runs/x")
    model = tune(model, conversations="mix.json", images="images/", train_projector=True)
    evaluate(model, text="texts/")

Importing this package imports neither torch nor transformers; its functions do.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from eqat_mm.errors import EqatError
from eqat_mm.runtime.after_import import after_import

if TYPE_CHECKING:
    from eqat_mm.api import adapters
    from eqat_mm.api.judging import Evaluation, evaluate
    from eqat_mm.api.phases import plan_for, quantize, tune
    from eqat_mm.api.training import RoundStepSizes, train_only
    from eqat_mm.checkpoint.read import load

__version__ = "0.2.0"
__all__ = [
    "EqatError",
    "Evaluation",
    "RoundStepSizes",
    "__version__",
    "adapters",
    "evaluate",
    "load",
    "plan_for",
    "quantize",
    "train_only",
    "tune",
]

_HOMES = {
    "Evaluation": "eqat_mm.api.judging",
    "RoundStepSizes": "eqat_mm.api.training",
    "adapters": "eqat_mm.api.adapters",
    "evaluate": "eqat_mm.api.judging",
    "load": "eqat_mm.checkpoint.read",
    "plan_for": "eqat_mm.api.phases",
    "quantize": "eqat_mm.api.phases",
    "train_only": "eqat_mm.api.training",
    "tune": "eqat_mm.api.phases",
}


# from here on transformers' own `from_pretrained` gives packed modules for our folders
after_import("transformers.quantizers.auto", lambda: import_module("eqat_mm.api.from_pretrained"))


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'eqat_mm' has no attribute {name!r}")
    home = import_module(_HOMES[name])
    return home if home.__name__.endswith(f".{name}") else getattr(home, name)


def __dir__() -> list[str]:
    return __all__
