"""Jobs on the tiny model that take a second or less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eqat_mm.commands.verbs.llm_qat import LLMQATJob
from eqat_mm.commands.verbs.quantize import BlockAPJob, RTNJob
from eqat_mm.commands.verbs.tune import E2EQPJob
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.fit import FitConfig
from tests.tiny_model import Tiny

SPEC = QuantSpec(bits=2, group_size=32)
SIX_STEPS: dict[str, Any] = {
    "learning_rate": 2e-3,
    "max_steps": 6,
    "batch_size": 4,
    "accumulation": 1,
    "logging_steps": 1,
    "save_steps": 0,
}


def block_ap_job(tiny: Tiny, output: Path | None, **changes: Any) -> BlockAPJob:
    """Block-AP on 12 windows."""
    fit = FitConfig(epochs=1, lr_weight=2e-3, validation_samples=3)
    settings = {"quant": SPEC, "fit": fit, "calibration": tiny.windows(12)}
    return BlockAPJob(**(_common(tiny, output) | settings | changes))


def e2e_qp_job(tiny: Tiny, quantized: Path | None, output: Path | None, **changes: Any) -> E2EQPJob:
    """Six optimizer steps of E2E-QP."""
    settings = {"quantized": quantized, "quant": SPEC, "loss": "kl", "data": tiny.windows(24)}
    return E2EQPJob(**(_common(tiny, output) | SIX_STEPS | settings | changes))


def llm_qat_job(tiny: Tiny, output: Path | None, **changes: Any) -> LLMQATJob:
    """Six optimizer steps of LLM-QAT at 4-8-4."""
    settings = {"bits": "4-8-4", "data": tiny.windows(24)}
    return LLMQATJob(**(_common(tiny, output) | SIX_STEPS | settings | changes))


def _common(tiny: Tiny, output: Path | None) -> dict[str, Any]:
    model = str(tiny.folder)
    return {"model": model, "output": output, "precision": "float32", "device": "cpu", "recipe_for": (model,)}


def rtn_job(tiny: Tiny, output: Path | None, **changes: Any) -> RTNJob:
    """Round to nearest."""
    settings: dict[str, Any] = {"model": str(tiny.folder), "output": output, "quant": SPEC}
    return RTNJob(**(settings | changes))
