"""What the numbers of a run say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eqat_mm.report.found import Stage
from eqat_mm.verify.training import training_checks

GOOD = {"loss_before": 0.2, "loss_after": 0.1, "skipped": 0, "retries": 0, "relative_error": 0.3}


def failed(command: str, metrics: list[dict[str, Any]], **record: Any) -> dict[str, str]:
    """Return what is wrong with a run that left these numbers, by check."""
    stage = Stage("run", Path("run"), {"command": command} | record, metrics, None, None)
    return {check.name: check.said for check in training_checks(stage) if check.passed is False}


def blocks(**second: Any) -> list[dict[str, Any]]:
    return [GOOD | {"block": 0}, GOOD | {"block": 1} | second]


@pytest.mark.parametrize(
    ("second", "name", "said"),
    [
        ({"loss_after": float("nan")}, "losses", "block 1 0.2 -> not finite"),
        ({"loss_after": 0.25}, "training", "block 1 0.2 -> 0.25"),
        ({"relative_error": 1.5}, "relative error", "block 1 1.500"),
        ({"skipped": 3, "retries": 1}, "steps", "block 1: 3 steps skipped, 1 retries"),
    ],
)
def test_a_block_that_went_wrong_is_named(second: dict[str, Any], name: str, said: str) -> None:
    assert failed("block-ap", blocks(**second)) == {name: said}
    assert failed("block-ap", blocks()) == {}


def steps(*losses: float, norm: float = 1.0) -> list[dict[str, Any]]:
    return [{"step": step, "loss": loss, "grad_norm": norm} for step, loss in enumerate(losses)]


def test_steps_that_went_wrong() -> None:
    assert failed("e2e-qp", steps(4, 3, 2, 1, 1, 1, 1, 1)) == {}
    assert failed("e2e-qp", steps(1, 1, 1, 1, 2, 2, 3, 3)) == {"training": "loss 1 -> 3"}
    assert failed("e2e-qp", steps(1, float("inf"), 1, 1, 1)) == {"losses": "some are not finite"}
    assert failed("llm-qat", steps(1, 1, norm=0.0)) == {"gradients": "2 of 2 are zero"}


@pytest.mark.parametrize(("peak", "wrong"), [(1150, {}), (1160, {"RAM at the peak": "1.2 kB, planned 1.0 kB (1.16)"})])
def test_memory_is_judged_by_the_plan(peak: int, wrong: dict[str, str]) -> None:
    assert failed("block-ap", blocks(), plan={"ram": 1000}, peak_ram=peak, environment={"device": "cpu"}) == wrong


def test_of_a_run_that_has_only_begun_nothing_is_judged() -> None:
    stage = Stage("run", Path("run"), {"command": "block-ap", "plan": {"seconds": 9.0}}, [], None, None)
    assert [check.passed for check in training_checks(stage)] == [None]
