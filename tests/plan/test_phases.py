"""Exact bytes of streams and optimizers, and what settings change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from eqat_mm.plan.amounts import Amount
from eqat_mm.plan.block_ap import plan_block_ap
from eqat_mm.plan.e2e_qp import keeps_teacher, plan_e2e_qp
from eqat_mm.plan.end_to_end import image_text_work, text_work
from eqat_mm.plan.finish import plan_checkpoint, plan_evaluation
from eqat_mm.plan.llm_qat import plan_llm_qat
from eqat_mm.plan.machine import card
from eqat_mm.plan.storage import checkpoint_bytes
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.block_ap import BlockAPConfig
from eqat_mm.train.e2e_qp import E2EQPConfig
from eqat_mm.train.fit import FitConfig
from eqat_mm.train.llm_qat import LLMQATConfig
from tests.plan.shapes import shape

SPEC = QuantSpec(bits=2, group_size=64)
H100 = card("h100")
WINDOWS = text_work(4096, 2048)
STREAM = 4096 * 2048 * 4096 * 2
"""Bytes of a stream of a 7B in bfloat16."""
IN_RAM = BlockAPConfig(stream_dtype="bfloat16", spool="ram")
ON_DISK = replace(IN_RAM, spool="disk")


def term(amount: Amount, what: str) -> float:
    return sum(part.value for part in amount.terms if part.what == what)


# ---- Block-AP -------------------------------------------------------------------------------------


def test_streams_in_memory_are_not_written() -> None:
    phase = plan_block_ap(shape("llama-2-7b"), IN_RAM, WINDOWS, H100)
    assert term(phase.ram, "streams") == 2 * STREAM == 137_438_953_472
    assert phase.written.total == phase.disk.total == checkpoint_bytes(shape("llama-2-7b"), SPEC)


def test_streams_on_disk_are_written_once_per_block() -> None:
    phase = plan_block_ap(shape("llama-2-7b"), ON_DISK, WINDOWS, H100)
    assert term(phase.ram, "streams") == 0
    assert term(phase.disk, "streams") == 4 * STREAM
    assert term(phase.written, "streams") == 2 * 33 * STREAM == 4_535_485_464_576


def test_float32_streams_are_twice_as_large() -> None:
    config = replace(IN_RAM, stream_dtype="float32")
    phase = plan_block_ap(shape("llama-2-7b"), config, WINDOWS, H100)
    assert term(phase.ram, "streams") == 4 * STREAM


def test_what_is_trained_of_a_block() -> None:
    phase = plan_block_ap(shape("llama-2-7b"), IN_RAM, WINDOWS, H100)
    trained = 202_375_168 + 2 * 202_375_168 // 64 + 2 * 4096
    assert phase.gpu.terms[0].value == 20 * trained
    symmetric = replace(IN_RAM, quant=QuantSpec(bits=2, group_size=64, symmetric=True))
    less = plan_block_ap(shape("llama-2-7b"), symmetric, WINDOWS, H100)
    assert phase.gpu.total - less.gpu.total == 20 * 202_375_168 // 64


def test_time_grows_with_epochs_and_memory_with_the_batch() -> None:
    once, twice = (
        plan_block_ap(shape("llama-2-7b"), replace(IN_RAM, fit=FitConfig(epochs=epochs)), WINDOWS, H100)
        for epochs in (1, 2)
    )
    assert term(twice.seconds, "training") == 2 * term(once.seconds, "training")
    larger = plan_block_ap(shape("llama-2-7b"), replace(IN_RAM, fit=FitConfig(batch_size=8)), WINDOWS, H100)
    assert term(larger.gpu, "activations") == 4 * term(once.gpu, "activations")


# ---- end to end -----------------------------------------------------------------------------------


def test_static_memory_of_e2e_qp() -> None:
    phase = plan_e2e_qp(shape("llama-2-7b"), SPEC, E2EQPConfig(), text_work(4096, 4096), H100)
    assert term(phase.gpu, "step sizes") == 12 * 101_187_584
    assert term(phase.gpu, "their gradients") == 4 * 101_187_584
    assert term(phase.gpu, "not quantized") == 2 * 262_410_240
    assert term(phase.gpu, "inputs of blocks") == 32 * 4096 * 2 * 8192
    assert term(phase.gpu, "projector") == term(phase.gpu, "teacher") == 0


def test_gradients_of_one_backward_come_as_activations_go() -> None:
    alone = E2EQPConfig(accumulation=1)
    phase = plan_e2e_qp(shape("llama-2-7b"), SPEC, alone, text_work(4096, 4096), H100)
    assert term(phase.gpu, "their gradients") == 4 * 101_187_584 / 32
    sharded = plan_e2e_qp(shape("llama-2-7b"), SPEC, replace(alone, deepspeed="zero-2"), text_work(4096, 4096), H100)
    assert term(sharded.gpu, "their gradients") == 4 * 101_187_584


def test_a_teacher_is_there_as_well() -> None:
    phase = plan_e2e_qp(shape("llama-2-7b"), SPEC, E2EQPConfig(loss="kl"), text_work(4096, 4096), H100)
    assert term(phase.gpu, "teacher") == 2 * 6_738_415_616


def test_a_teacher_in_a_file_is_gone_when_training_begins() -> None:
    small, work = E2EQPConfig(loss="kl", epochs=2, teacher="memory"), text_work(192, 2048)
    there = plan_e2e_qp(shape("llama-2-7b"), SPEC, small, work, H100)
    kept = plan_e2e_qp(shape("llama-2-7b"), SPEC, replace(small, teacher="auto"), work, H100)
    assert kept.gpu.total == 2 * 6_738_415_616 < there.gpu.total
    assert term(kept.disk, "teacher's hidden states") == 192 * 2048 * 2 * 4096
    saved = term(there.seconds, "products") - term(kept.seconds, "products")
    assert saved == pytest.approx(192 * 2048 * 2 * shape("llama-2-7b").passed / H100.product)


@pytest.mark.parametrize("changes", [{"max_steps": 5}, {"deepspeed": "zero-3"}, {"loss": "cross-entropy"}])
def test_a_file_that_would_not_pay_is_not_made(changes: dict[str, Any]) -> None:
    settings, work = replace(E2EQPConfig(loss="kl"), **changes), text_work(192, 2048)
    assert not keeps_teacher(shape("llama-2-7b"), SPEC, settings, work, H100)
    assert not keeps_teacher(shape("llama-2-7b"), SPEC, E2EQPConfig(loss="kl"), text_work(4096, 4096), H100)
    assert not keeps_teacher(shape("llava-1.5-7b"), SPEC, E2EQPConfig(loss="kl"), work, H100)


def test_more_cards_take_fewer_steps() -> None:
    one, eight = (
        plan_e2e_qp(shape("llama-2-7b"), SPEC, E2EQPConfig(), text_work(4096, 4096), card("h100", count))
        for count in (1, 8)
    )
    assert term(one.seconds, "products") == 8 * term(eight.seconds, "products")
    assert (one.processes, eight.processes) == (1, 8)


def test_what_the_trainer_saves() -> None:
    settings = E2EQPConfig(max_steps=450, save_steps=100)
    phase = plan_e2e_qp(shape("llama-2-7b"), SPEC, settings, text_work(4096, 4096), H100)
    each = 12 * 101_187_584
    assert term(phase.written, "to resume from") == 5 * each
    assert term(phase.disk, "to resume from") == 3 * each
    none = plan_e2e_qp(shape("llama-2-7b"), SPEC, replace(settings, save_steps=0), text_work(4096, 4096), H100)
    assert none.written.total == checkpoint_bytes(shape("llama-2-7b"), SPEC)


def test_images_pass_the_tower() -> None:
    found = shape("llava-1.5-7b")
    settings = E2EQPConfig(trains="scales+projector", batch_size=4, accumulation=8)
    phase = plan_e2e_qp(found, SPEC, settings, image_text_work(found, 665_298, 2048), card("h100", 8))
    assert phase.name == "E2E-QP, images and text"
    assert term(phase.gpu, "projector") == 16 * 20_979_712
    assert 0 < term(phase.seconds, "vision tower") < term(phase.seconds, "products")


def test_llm_qat_is_divided_as_deepspeed_says() -> None:
    found = shape("llama-2-7b")
    number = found.parameters
    states = {"weights": 4.0, "gradients": 4.0, "AdamW": 8.0, "teacher": 2.0}
    for settings, divided in (
        (None, ()),
        ("zero-1", ("AdamW",)),
        ("zero-2", ("AdamW", "gradients")),
        ("zero-3", states),
    ):
        phase = plan_llm_qat(found, LLMQATConfig(deepspeed=settings), WINDOWS, card("h100", 8))
        expected = {what: each * number / (8 if what in divided else 1) for what, each in states.items()}
        assert {what: term(phase.gpu, what) for what in states} == expected


# ---- after training -------------------------------------------------------------------------------


def test_evaluation_holds_one_model_at_a_time() -> None:
    phase = plan_evaluation(shape("llama-2-7b"), 64, 512, 4, H100)
    assert term(phase.gpu, "full-precision model") == 2 * 6_738_415_616
    assert term(phase.ram, "reference outputs") == 64 * 512 * 4096 * 2


def test_a_checkpoint_is_its_tensors() -> None:
    phase = plan_checkpoint(shape("llama-2-7b"), SPEC, H100)
    assert phase.disk.total == phase.written.total == 2_371_497_472


@pytest.mark.parametrize("name", ["llama-2-7b", "smollm2-135m"])
def test_without_a_gpu_everything_is_in_ram(name: str) -> None:
    cpu = replace(H100, name="cpu", memory=None, precision="float32")
    for phase in (
        plan_block_ap(shape(name), IN_RAM, text_work(64, 256), cpu),
        plan_e2e_qp(shape(name), SPEC, E2EQPConfig(), text_work(64, 256), cpu),
        plan_evaluation(shape(name), 64, 512, 4, cpu),
    ):
        assert phase.gpu.total == 0
        assert phase.ram.total > cpu.process
