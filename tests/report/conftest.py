"""Runs on the tiny model with evaluations beside them, made once and not to be altered."""

from __future__ import annotations

from pathlib import Path

import pytest

from eqat_mm.commands.evaluate import EvalJob, evaluate
from eqat_mm.commands.quantize import block_ap, rtn
from eqat_mm.commands.runs import model_fingerprint
from eqat_mm.commands.tune import e2e_qp
from eqat_mm.report import Found, find
from tests.commands.conftest import memory_enough
from tests.commands.jobs import block_ap_job, e2e_qp_job, rtn_job
from tests.tiny_model import Tiny, save_tiny

__all__ = ["memory_enough"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return save_tiny(tmp_path_factory.mktemp("tiny"), blocks=2)


@pytest.fixture(scope="session")
def root(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of three runs; full precision and Block-AP are evaluated, the others are not."""
    root = tmp_path_factory.mktemp("runs") / "tiny-w2g32"
    rtn(rtn_job(tiny, root / "rtn"))
    fitted = block_ap(block_ap_job(tiny, root / "block-ap"))
    e2e_qp(e2e_qp_job(tiny, fitted, root / "e2e-qp"))
    for name, model in (("full", tiny.folder), ("block-ap", fitted)):
        job = EvalJob(str(model), reference=str(tiny.folder), data=tiny.windows(4, held_out=True), device="cpu")
        evaluate(EvalJob(**{**vars(job), "output": root / "eval" / f"{name}.json"}))
    return root


@pytest.fixture
def found(root: Path) -> Found:
    return find(root, model_fingerprint)
