"""What fits, on which card, and which flags are named where it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eqat_mm.errors import ConfigError
from eqat_mm.plan.amounts import Amount, Phase, amount, size
from eqat_mm.plan.block_ap import plan_block_ap
from eqat_mm.plan.e2e_qp import plan_e2e_qp
from eqat_mm.plan.end_to_end import text_work
from eqat_mm.plan.llm_qat import plan_llm_qat
from eqat_mm.plan.machine import CONTEXT, card, card_names, this_machine
from eqat_mm.plan.options import block_ap_options, e2e_qp_options, llm_qat_options
from eqat_mm.plan.verdict import judge, with_ram_and_disk
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.block_ap import BlockAPConfig
from eqat_mm.train.e2e_qp import E2EQPConfig
from eqat_mm.train.llm_qat import LLMQATConfig
from tests.plan.shapes import shape

SPEC = QuantSpec(bits=2, group_size=64)
SIZES = {137_438_953_472: "137.44 GB", 4.5e12: "4.50 TB", 2e6: "2.00 MB", 96: "0 kB"}


def phase_of(gpu: float = 0.0, ram: float = 0.0, disk: float = 0.0, processes: int = 1) -> Phase:
    return Phase("a phase", *(_bytes(number) for number in (gpu, ram, disk, 0.0, 0.0)), processes)


def _bytes(number: float) -> Amount:
    return amount(("all", number, ""))


def test_what_is_not_known_is_not_judged() -> None:
    assert judge(phase_of(ram=1e15, disk=1e15), card("4090")).fits


def test_every_resource_is_judged() -> None:
    machine = with_ram_and_disk(card("4090"), ram=64, disk=100)
    verdict = judge(phase_of(gpu=30e9, ram=65e9, disk=200e9), machine)
    assert [shortage.what for shortage in verdict.shortages] == ["GPU memory", "RAM", "disk"]
    assert [shortage.hopeless for shortage in verdict.shortages] == [True, False, True]
    assert str(verdict.shortages[1]) == "RAM: 65.00 GB needed, 64.00 GB there"


def test_every_process_needs_its_ram() -> None:
    machine = with_ram_and_disk(card("4090", 8), ram=64, disk=None)
    assert judge(phase_of(ram=7e9, processes=8), machine).fits
    assert not judge(phase_of(ram=9e9, processes=8), machine).fits


def test_the_context_is_not_for_tensors() -> None:
    memory = card("4090").memory or 0.0
    assert judge(phase_of(gpu=memory - CONTEXT), card("4090")).fits
    assert not judge(phase_of(gpu=memory), card("4090")).fits


def test_cards_that_would_do() -> None:
    assert judge(phase_of(gpu=30e9), card("4090")).cards == ("5090", "l40s", "a100", "h100", "h200")


def test_flags_that_cure_it_are_named() -> None:
    config, machine = (
        BlockAPConfig(stream_dtype="bfloat16", spool="ram"),
        with_ram_and_disk(card("h100"), ram=100, disk=10_000),
    )
    phase = plan_block_ap(shape("llama-2-7b"), config, text_work(4096, 2048), machine)
    verdict = judge(phase, machine, block_ap_options(shape("llama-2-7b"), config, text_work(4096, 2048), machine))
    assert [shortage.what for shortage in verdict.shortages] == ["RAM"]
    assert verdict.cures[:2] == ("--spool disk", "--calibration.count 2048")
    assert verdict.advice().startswith("it fits with --spool disk, or with --calibration.count 2048")


def test_a_smaller_batch_is_named_for_e2e_qp() -> None:
    found, config, work, machine = shape("llama-2-70b"), E2EQPConfig(), text_work(4096, 4096), card("l40s")
    phase = plan_e2e_qp(found, SPEC, config, work, machine)
    verdict = judge(phase, machine, e2e_qp_options(found, SPEC, config, work, machine))
    assert "--batch_size 1 --accumulation 32" in verdict.cures
    assert "on a100 or h100 or h200" in verdict.advice()


def test_processes_are_named_for_llm_qat() -> None:
    found, config, work, machine = shape("llama-2-7b"), LLMQATConfig(), text_work(4096, 2048), card("h100")
    phase = plan_llm_qat(found, config, work, machine)
    verdict = judge(phase, machine, llm_qat_options(found, config, work, machine))
    assert "--deepspeed zero-3 on 2 GPUs" in verdict.cures


def test_nothing_is_advised_that_does_not_help() -> None:
    verdict = judge(phase_of(gpu=1e15), card("4090"))
    assert verdict.advice() == "no single flag is enough: take another machine"


# ---- machines -------------------------------------------------------------------------------------


def test_a_measured_card_says_so() -> None:
    assert (card("h200").product, card("h200").copy, card("h200").origin) == (785e12, 4.16e12, "measured")
    assert card("a100").product == pytest.approx(248e12, rel=0.01)


def test_an_unknown_card_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as raised:
        card("voodoo2")
    assert all(name in raised.value.allowed for name in (*card_names(), "cpu"))


def test_this_machine_knows_its_ram_and_disk(tmp_path: Path) -> None:
    machine = this_machine(torch.device("cpu"), tmp_path / "not" / "there")
    assert machine.ram is not None
    assert machine.disk is not None
    assert machine.ram > machine.process > 0
    assert machine.disk > 0
    assert machine.product > 1e8
    assert not machine.is_gpu
    assert replace(machine, memory=1.0).is_gpu


@pytest.mark.parametrize(("number", "text"), SIZES.items())
def test_sizes_are_decimal(number: float, text: str) -> None:
    assert size(number) == text
