"""The demo, cut short, on every implementation of the kernels: SmolLM2 and its real text give the same losses."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eqat_kernels import cpu_library, use
from eqat_mm.blocks.walker import BlockStep, BlockWalker
from eqat_mm.cli import main
from eqat_mm.train import block_ap
from eqat_mm.train.fit import FitConfig, fit_block
from eqat_mm.train.report import FitReport
from tests.tolerances import TOLERANCES

pytestmark = pytest.mark.slow
log = logging.getLogger(__name__)

IMPLEMENTATIONS = ("cpu", "triton", "reference")

SHORT = {
    "block-ap": {
        "model": "smollm2-135m",
        "config": "smollm2-135m-w2g64-block-ap",
        "calibration.source": "demo-wikipedia",
        "fit.loss": "mse",
        "start.samples": 4,
        "calibration.length": 64,
        "calibration.count": 6,
        "fit.epochs": 1,
        "fit.batch_size": 2,
        "fit.validation_samples": 2,
        "precision": "float32",
    },
    "e2e-qp": {
        "model": "smollm2-135m",
        "config": "smollm2-135m-w2g64-e2e-qp",
        "data.source": "demo-wikipedia",
        "max_steps": 3,
        "logging_steps": 1,
        "save_steps": 0,
        "data.length": 64,
        "data.count": 6,
        "batch_size": 2,
        "precision": "float32",
    },
}
"""The demo's own settings on six windows of 64 tokens: two steps for each of the 30 blocks, three for the whole."""


def enlarge_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program do the work of many: the interpreter's time goes by their number. The source is the same."""
    from eqat_kernels.dequant import triton_impl as dequant
    from eqat_kernels.fake_quant import triton_impl as fake_quant
    from eqat_kernels.packing import triton_impl as packing
    from eqat_kernels.quant_linear import triton_impl as quant_linear

    monkeypatch.setattr(fake_quant, "TILE", 1 << 18)
    monkeypatch.setattr(dequant, "ROWS", 2048)
    monkeypatch.setattr(packing, "ROWS", 2048)
    monkeypatch.setattr(quant_linear, "ROWS", 2048)


def run(name: str, folder: Path, **options: object) -> list[dict[str, Any]]:
    """Run a command of the demo; return its record."""
    words = [word for key, value in (SHORT[name] | options).items() for word in (f"--{key}", str(value))]
    assert main([name, *words, "--output", str(folder)]) == 0
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses_of_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Losses of every block by implementation: before, while and after it is trained, each from the same state.

    From block to block the reference goes on. Else a code that a last bit tips over would change all that follows.
    """
    found: dict[str, list[list[float]]] = {impl: [] for impl in IMPLEMENTATIONS}

    def fit_with_all(walker: BlockWalker, step: BlockStep, config: FitConfig, *, seed: int) -> FitReport:
        for impl in IMPLEMENTATIONS:
            copied = step if impl == "reference" else replace(step, block=copy.deepcopy(step.block))
            with use(impl):
                report = fit_block(walker, copied, config, seed=seed)
            found[impl].append([report.loss_before, *report.training, *report.validation])
        return report

    monkeypatch.setattr(block_ap, "fit_block", fit_with_all)
    with use("reference"):
        run("block-ap", folder)
    return {impl: torch.tensor(losses) for impl, losses in found.items()}


def losses_of_the_whole(folder: Path, blocks: Path) -> dict[str, Tensor]:
    """Losses of E2E-QP behind one Block-AP, by implementation and step."""
    found = {}
    for impl in IMPLEMENTATIONS:
        with use(impl):
            log = run("e2e-qp", folder / impl, quantized=blocks / "model")
        found[impl] = torch.tensor([record["loss"] for record in log if "loss" in record])
    return found


def test_block_ap_and_e2e_qp_of_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if cpu_library.obstacle():
        pytest.skip(str(cpu_library.obstacle()))
    enlarge_tiles(monkeypatch)
    blocks = losses_of_blocks(tmp_path / "blocks", monkeypatch)
    whole = losses_of_the_whole(tmp_path, tmp_path / "blocks")
    assert blocks["reference"].shape == (30, 3)
    assert whole["reference"].shape == (3,)
    for stage, found in (("Block-AP", blocks), ("E2E-QP", whole)):
        wanted = found["reference"]
        for impl in ("cpu", "triton"):
            error = ((found[impl] - wanted).abs() / wanted).max()
            log.info("%s, %s: largest relative difference of a loss %.1e", stage, impl, error)
            assert error < TOLERANCES["model"][torch.float32]
