"""The formulas against what was published and what was measured on a card."""

from __future__ import annotations

from dataclasses import replace

import pytest

from eqat_mm.plan.block_ap import plan_block_ap
from eqat_mm.plan.costs import ORIGINAL
from eqat_mm.plan.e2e_qp import plan_e2e_qp
from eqat_mm.plan.end_to_end import text_work
from eqat_mm.plan.machine import card
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.block_ap import BlockAPConfig
from eqat_mm.train.e2e_qp import E2EQPConfig
from tests.plan.shapes import shape

SPEC = QuantSpec(bits=2, group_size=64)
WINDOWS = text_work(4096, 2048)
PAPER = BlockAPConfig(stream_dtype="bfloat16")


def about(known: float) -> object:
    """The plan is good to 15%."""
    return pytest.approx(known, rel=0.15)


@pytest.mark.parametrize(("name", "memory"), [("llama-2-7b", 8.5), ("llama-2-13b", 10.3), ("llama-2-70b", 29.9)])
def test_published_memory_of_block_ap(name: str, memory: float) -> None:
    assert plan_block_ap(shape(name), PAPER, WINDOWS, card("a100"), ORIGINAL).gpu.total / 1e9 == about(memory)


@pytest.mark.parametrize(("name", "hours"), [("llama-2-7b", 3.3), ("llama-2-70b", 26.6)])
def test_published_hours_of_block_ap(name: str, hours: float) -> None:
    assert plan_block_ap(shape(name), PAPER, WINDOWS, card("a100"), ORIGINAL).seconds.total / 3600 == about(hours)


@pytest.mark.parametrize(("name", "memory"), [("llama-2-7b", 5.6), ("llama-2-13b", 9.1), ("llama-2-70b", 34.2)])
def test_published_memory_of_e2e_qp(name: str, memory: float) -> None:
    settings = E2EQPConfig(batch_size=1, accumulation=32)
    phase = plan_e2e_qp(shape(name), SPEC, settings, text_work(4096, 4096), card("a100"), ORIGINAL)
    assert phase.gpu.total / 1e9 == about(memory)


@pytest.mark.parametrize(("name", "hours"), [("llama-2-7b", 1.5), ("llama-2-70b", 41 - 26.6)])
def test_published_hours_of_e2e_qp(name: str, hours: float) -> None:
    phase = plan_e2e_qp(shape(name), SPEC, E2EQPConfig(), text_work(4096, 4096), card("a100"), ORIGINAL)
    assert phase.seconds.total / 3600 == about(hours)


def test_memory_measured_on_an_h200() -> None:
    found, machine = shape("llama-2-7b"), card("h200")
    assert plan_block_ap(found, PAPER, WINDOWS, machine).gpu.total / 1e9 == pytest.approx(5.26, rel=0.1)
    four = replace(found, blocks=found.blocks[:4])
    settings = E2EQPConfig(gradient_checkpointing=True)
    phase = plan_e2e_qp(four, SPEC, settings, text_work(4096, 4096), machine)
    assert phase.gpu.total / 1e9 == pytest.approx(3.99, rel=0.1)


def test_a_step_measured_on_an_h200() -> None:
    training = plan_block_ap(shape("llama-2-7b"), PAPER, WINDOWS, card("h200")).seconds.terms[0]
    assert training.value / (32 * 4032) == pytest.approx(17.7e-3, rel=0.01)
