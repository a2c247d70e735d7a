"""Jobs on the tiny model that take a second or less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eqat_mm.commands.quantize import BlockAPJob, RTNJob
from eqat_mm.commands.tune import E2EQPJob
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.fit import FitConfig
from tests.checkpoint.files import same_bytes, tensors_of
from tests.tiny_model import Tiny

SPEC = QuantSpec(bits=2, group_size=32)


def block_ap_job(tiny: Tiny, output: Path | None, **changes: Any) -> BlockAPJob:
    """Block-AP on 12 windows."""
    settings: dict[str, Any] = {
        "model": str(tiny.folder),
        "output": output,
        "quant": SPEC,
        "fit": FitConfig(epochs=1, lr_weight=2e-3, validation_samples=3),
        "calibration": tiny.windows(12),
        "precision": "float32",
        "device": "cpu",
        "recipe_for": (str(tiny.folder),),
    }
    return BlockAPJob(**(settings | changes))


def e2e_qp_job(tiny: Tiny, quantized: Path | None, output: Path | None, **changes: Any) -> E2EQPJob:
    """Six optimizer steps of E2E-QP."""
    settings: dict[str, Any] = {
        "model": str(tiny.folder),
        "quantized": quantized,
        "output": output,
        "quant": SPEC,
        "loss": "kl",
        "learning_rate": 2e-3,
        "max_steps": 6,
        "batch_size": 4,
        "accumulation": 1,
        "logging_steps": 1,
        "save_steps": 0,
        "data": tiny.windows(24),
        "precision": "float32",
        "device": "cpu",
        "recipe_for": (str(tiny.folder),),
    }
    return E2EQPJob(**(settings | changes))


def rtn_job(tiny: Tiny, output: Path | None, **changes: Any) -> RTNJob:
    """Round to nearest."""
    settings: dict[str, Any] = {"model": str(tiny.folder), "output": output, "quant": SPEC}
    return RTNJob(**(settings | changes))


def same_weights(left: Path, right: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    a, b = tensors_of(left), tensors_of(right)
    assert a.keys() == b.keys()
    return all(same_bytes(a[name], b[name]) for name in a)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
