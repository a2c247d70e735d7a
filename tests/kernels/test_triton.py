"""The Triton source against the reference in float64: interpreted on the CPU, or on a GPU (`make test-gpu`)."""

from __future__ import annotations

import pytest

from tests.kernels.sweep import CHECKS, Case, full_sweep, short_sweep

pytest.importorskip("triton")


@pytest.mark.parametrize("case", short_sweep(), ids=str)
@pytest.mark.parametrize("op", CHECKS)
def test_interpreted(op: str, case: Case) -> None:
    CHECKS[op](case, "triton", "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("case", full_sweep(), ids=str)
@pytest.mark.parametrize("op", CHECKS)
def test_interpreted_in_every_combination(op: str, case: Case) -> None:
    CHECKS[op](case, "triton", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", full_sweep(), ids=str)
@pytest.mark.parametrize("op", CHECKS)
def test_on_the_device(op: str, case: Case) -> None:
    CHECKS[op](case, "triton", "cuda")
