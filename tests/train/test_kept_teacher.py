"""A teacher that is a file predicts what the model in memory does, whatever its architecture does to its logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from eqat_mm.checkpoint.read import load
from eqat_mm.train.e2e_qp import run_e2e_qp
from eqat_mm.train.end_to_end import WindowDataset, training_arguments
from eqat_mm.train.held_out import logits_at
from eqat_mm.train.kept_teacher import KeptTeacher, is_kept, keep_hidden_states
from eqat_mm.train.losses import kl_divergence
from llava_adapters import arch_for
from tests.train.problems import CPU
from tests.train.test_e2e_qp import CONFIG

ROUNDED = 2**-8
"""Of bfloat16: half a last bit, relative."""


def kept(model: transformers.PreTrainedModel, windows: Tensor, path: Path) -> KeptTeacher:
    keep_hidden_states(model, windows, path, 4, "float32")
    return KeptTeacher(model, windows, path)


@pytest.mark.parametrize("name", ["llama", "granite", "gemma3_text", "mixtral", "olmo2"])
def test_its_logits_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    arch = arch_for(name, "a test")
    model, batches = arch.tiny()
    windows = batches[0]["input_ids"]
    teacher, columns = kept(model, windows, tmp_path / "teacher.bin"), torch.arange(windows.shape[1] - 1)
    inputs = {"input_ids": windows.flip(0), "labels": windows.flip(0)}
    with torch.no_grad():
        found, wanted = (logits_at(each, inputs, columns, "float32") for each in (teacher, model))
        hidden = model.base_model(input_ids=inputs["input_ids"]).last_hidden_state[:, columns]
    weight = model.get_output_embeddings().weight
    bound = hidden.abs() @ weight.abs().T * ROUNDED
    assert ((found - wanted).abs() <= bound + 1e-6).all()
    assert kl_divergence(found, wanted, windows.flip(0)[:, 1:]) < 1e-4
    assert not torch.equal(found, wanted)


def test_a_student_learns_from_it_as_from_the_model(
    packed: Path, teacher: transformers.PreTrainedModel, windows: Tensor, tmp_path: Path
) -> None:
    keep_hidden_states(teacher, windows, tmp_path / "teacher.bin", 5, "float32")
    assert is_kept(tmp_path / "teacher.bin", windows, teacher.config.hidden_size)
    assert not is_kept(tmp_path / "teacher.bin", windows[1:], teacher.config.hidden_size)
    losses = []
    for kind in ("memory", "cache"):
        model = load(packed)
        taught_by = KeptTeacher(model, windows, tmp_path / "teacher.bin") if kind == "cache" else teacher
        config = replace(CONFIG, loss="kl")
        arguments = training_arguments(config, tmp_path / kind, CPU)
        log = run_e2e_qp(model, WindowDataset(windows), config, arguments, teacher=taught_by)
        losses.append([record["loss"] for record in log if "loss" in record])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert "forward" not in model.base_model.__dict__
    assert not list(taught_by.parameters())
