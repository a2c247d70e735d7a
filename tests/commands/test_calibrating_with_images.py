"""Block-AP on conversations about images: the streams are those of the model, and both kinds of tokens count."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from eqat_mm.blocks.walker import BlockWalker, capture_front
from eqat_mm.checkpoint.folders import load_for_inference
from eqat_mm.commands.plumbing.calibration import Calibration, calibration_of
from eqat_mm.commands.verbs.quantize import block_ap
from eqat_mm.train import block_ap as trainer
from eqat_mm.train.block_ap import BlockAPConfig, run_block_ap
from eqat_mm.train.losses import block_loss
from eqat_mm.train.modalities import PADDING, VISUAL, Modalities, equal_weights, kinds_of
from eqat_mm.train.warm_start import WarmStartConfig
from llava_adapters import arch_for
from tests.commands.image_bed import COUNT, CPU, FIT, SPEC, Bed, record_of
from tests.tolerances import assert_close
from tests.train.results import assert_same_result


def walker_of(bed: Bed, found: Calibration) -> BlockWalker:
    opened = bed.open()
    assert found.visual is not None
    modalities = Modalities(found.visual, equal_weights(len(opened.blocks)))
    samples = capture_front(opened, modalities.noting(found.batches), torch.float32)
    return BlockWalker(opened, samples, device=CPU, batch_tokens=200, weights=modalities.at)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "gemma3"])
@torch.no_grad()
def test_the_streams_are_the_hidden_states_of_the_model(name: str, beds: Callable[[str], Bed]) -> None:
    """Those of its own forward on the samples as they are, without any filling; called together with others."""
    bed = beds(name)
    found = bed.found()
    walker = walker_of(bed, found)
    for step in walker.walk():
        assert any(len(batch) > 1 for batch in step.batches(range(COUNT), 200))
        walker.advance_fp(step)
    model: Any = load_for_inference(bed.model, CPU, torch.float32)
    last: list[Tensor] = []
    arch_for(name).find_blocks(model)[-1].register_forward_hook(
        lambda module, args, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    filled = 0
    for index, batch in enumerate(found.batches):
        real = kinds_of(batch, torch.tensor([-1]))[0] != PADDING
        filled += int((~real).sum())
        length = len(real)
        model(**{key: value[:, real] if value.shape[:2] == (1, length) else value for key, value in batch.items()})
        assert_close(walker.fp.read(index)[:, real], last.pop(), "model")
    assert filled > 0


def test_samples_are_mixed_by_share(bed: Bed) -> None:
    for share, talks in ((0.25, 3), (0.5, 6), (1.0, 12), (0.001, 1)):
        found = bed.found(share)
        assert len(found.batches) == found.work.samples == COUNT
        with_mask = sum("attention_mask" in batch for batch in found.batches)
        assert with_mask == talks
    lengths = [batch["input_ids"].shape[1] for batch in bed.found().batches]
    work = bed.found().work
    assert (work.longest, work.mean) == (max(lengths), sum(lengths) / COUNT)
    seen = sum("pixel_values" in batch for batch in bed.found().batches)
    assert work.images == seen / COUNT


def test_images_are_read_once_and_not_before_the_run_begins(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    monkeypatch.setattr(
        "eqat_mm.data.image_text.samples.read_image", lambda source: read.append(source) or Image.new("RGB", (24, 24))
    )
    found = bed.found()
    assert read == []
    walker_of(bed, found)
    assert len(read) == round(found.work.images * COUNT)


def filled_otherwise(batches: list[Any]) -> list[Any]:
    """The same samples, with another token where they are filled up."""
    return [
        batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 33)}
        if "attention_mask" in batch
        else batch
        for batch in batches
    ]


@pytest.mark.parametrize(("start", "loss"), [("minmax", "mse"), ("gptq", "balanced")])
def test_what_fills_up_a_sample_decides_nothing(bed: Bed, tmp_path: Path, start: Any, loss: Any) -> None:
    found = bed.found()
    config = BlockAPConfig(SPEC, WarmStartConfig(start), replace(FIT, loss=loss), precision="float32")
    assert found.visual is not None
    for name, batches in (("one", list(found.batches)), ("other", filled_otherwise(list(found.batches)))):
        opened = bed.open()
        modalities = Modalities(found.visual, equal_weights(2))
        run_block_ap(
            opened,
            batches,
            config,
            tmp_path / name,
            device=CPU,
            source="tiny",
            provenance={"config": {}},
            modalities=modalities,
        )
    assert_same_result(tmp_path / "one", tmp_path / "other")


def test_what_counts_more_is_learned_better(bed: Bed) -> None:
    of_images, of_text = (_errors(bed, torch.tensor([[0.0, *row]] * 2)) for row in ((0.01, 1.0), (1.0, 0.01)))
    assert of_images[0] < of_text[0]
    assert of_text[1] < of_images[1]


def _errors(bed: Bed, of_kind: Tensor) -> tuple[float, float]:
    """Error of the trained first block on tokens of images and on those of text, of the samples it was trained on."""
    found = bed.found(1.0)
    assert found.visual is not None
    opened, modalities = bed.open(), Modalities(found.visual, of_kind)
    samples = capture_front(opened, modalities.noting(found.batches), torch.float32)
    walker = BlockWalker(opened, samples, device=CPU, weights=modalities.at)
    step = next(walker.walk())
    fit = replace(FIT, epochs=6, lr_weight=3e-3, lr_scale=3e-3, validation_samples=0)
    trainer.quantize_block(walker, step, BlockAPConfig(SPEC, fit=fit))
    sums = torch.zeros(2)
    for index, batch in enumerate(found.batches):
        kinds = kinds_of(batch, found.visual)
        for place, kind in enumerate((VISUAL, 3 - VISUAL)):
            weights = (kinds == kind).float()
            if weights.sum():
                error = block_loss(walker.quantized.read(index), walker.fp.read(index), weights_BT=weights)
                sums[place] += error.item()
    return sums[0].item(), sums[1].item()


def test_a_model_calibrated_with_images_understands_others_better(bed: Bed, tmp_path: Path) -> None:
    """On conversations that no calibration has seen, against the logits of the full-precision model."""
    fit = replace(FIT, epochs=4, lr_weight=2e-3)
    models = [bed.model]
    for name, talks in (("text", None), ("images", bed.talks)):
        models.append(block_ap(bed.job(tmp_path / name, conversations=talks, image_share=1.0, fit=fit)))
    talks = replace(bed.talks, source=str(_others(bed)))
    others = calibration_of(bed.model, bed.text, talks, 1.0, tmp_path / "run").batches
    wanted, of_text, of_images = (_logits(model, others) for model in models)
    assert (wanted - of_images).square().mean() < 0.9 * (wanted - of_text).square().mean()


@torch.no_grad()
def _logits(folder: Path, batches: Any) -> Tensor:
    model: Any = load_for_inference(folder, CPU, torch.float32)
    return torch.cat([model(**batch).logits[batch["attention_mask"] != 0] for batch in batches])


def _others(bed: Bed) -> Path:
    draw = random.Random(1)
    file = bed.folder / "others.json"
    file.write_text(json.dumps([record_of(bed.folder, number, draw) for number in range(24, 24 + COUNT)]))
    return file
