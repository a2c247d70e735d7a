"""A projector that is trained beside unquantized parts in bfloat16."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from eqat_mm.checkpoint.read import load
from eqat_mm.commands.verbs.quantize import RTNJob, rtn
from eqat_mm.train.e2e_qp import E2EQPConfig, E2EQPTrainer, trainable_groups
from eqat_mm.train.end_to_end import training_arguments
from llava_adapters.llava import ARCH
from tests.tiny_llava import save_tiny_llava
from tests.train.problems import CPU, SPEC


def test_it_has_float32_masters_and_gradients_from_images_and_from_text(tmp_path: Path) -> None:
    batches = save_tiny_llava(tmp_path / "llava", dtype=torch.float32)
    folder = rtn(RTNJob(model=str(tmp_path / "llava"), output=tmp_path / "rtn", quant=SPEC))
    model = load(folder, dtype="bfloat16")
    projector = ARCH.find_projector(model)
    assert isinstance(projector, nn.Module)
    config = E2EQPConfig(trains="scales+projector", precision="bfloat16")
    trainer = E2EQPTrainer(
        model=model,
        args=training_arguments(config, tmp_path / "trainer", CPU),
        groups=trainable_groups(model, projector, config),
        train_dataset=[],
        projector=projector,
        precision="bfloat16",
    )
    assert {parameter.dtype for parameter in projector.parameters()} == {torch.float32}
    assert model.get_input_embeddings().weight.dtype is torch.bfloat16
    for batch in batches:
        model.zero_grad()
        trainer.compute_loss(model, {**batch, "labels": batch["input_ids"]}).backward()
        about_images = "pixel_values" in batch
        for parameter in projector.parameters():
            assert parameter.grad is not None
            assert parameter.grad.dtype is torch.float32
            assert bool(parameter.grad.any()) is about_images
