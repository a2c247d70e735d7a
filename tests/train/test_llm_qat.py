"""LLM-QAT on a tiny model: what is trained, what it learns, and that the checkpoint computes what the student did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from eqat_mm.blocks.source import open_model
from eqat_mm.checkpoint.read import load
from eqat_mm.commands.plumbing.models import load_model
from eqat_mm.errors import ConfigError
from eqat_mm.quant.dynamic_linear import DynamicFakeLinear
from eqat_mm.quant.kv_cache import KVQuantizer
from eqat_mm.train.end_to_end import WindowDataset, training_arguments
from eqat_mm.train.llm_qat import (
    ROUNDED,
    STAGE,
    LLMQATConfig,
    prepare,
    run_llm_qat,
    smooth_model,
    store,
    trainable_groups,
)
from eqat_mm.train.losses import kl_divergence, predictions_that_count
from llava_adapters.llama import ARCH
from llava_adapters.registry import known_archs
from tests.tiny_model import Tiny, tiny_llama
from tests.tolerances import TOLERANCES, assert_close
from tests.train.problems import CPU, mean_loss, same
from tests.train.stopping import assert_a_stopped_run_is_continued

CONFIG = LLMQATConfig(
    bits="4-8-4", learning_rate=2e-3, max_steps=6, batch_size=4, accumulation=1, logging_steps=1, precision="float32"
)


def student(tiny: Tiny, config: LLMQATConfig = CONFIG) -> transformers.PreTrainedModel:
    model = load_model(tiny.folder, CPU)
    prepare(model, ARCH, config)
    return model


def train(
    model: transformers.PreTrainedModel,
    windows: Tensor,
    folder: Path,
    config: LLMQATConfig = CONFIG,
    teacher: nn.Module | None = None,
) -> list[float]:
    """Train; returns the loss of every optimizer step."""
    arguments = training_arguments(config, folder, CPU)
    log = run_llm_qat(model, WindowDataset(windows), config, arguments, teacher=teacher)
    model.eval()
    return [record["loss"] for record in log if "loss" in record]


@torch.no_grad()
def logits_of(model: nn.Module, windows: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=windows).logits
    return logits


# ---- the student ---------------------------------------------------------------------------------


def test_linears_and_attention_are_replaced(tiny: Tiny) -> None:
    model = student(tiny)
    fakes = [module for module in model.modules() if isinstance(module, DynamicFakeLinear)]
    assert len(fakes) == 3 * 7
    assert {(fake.spec.name, fake.activation_bits) for fake in fakes} == {("w4growsym", 8)}
    assert [module.bits for module in model.modules() if isinstance(module, KVQuantizer)] == [4, 4, 4]
    assert isinstance(model.get_submodule("lm_head"), nn.Linear)


def test_the_weights_are_those_of_the_full_precision_model(tiny: Tiny, teacher: nn.Module) -> None:
    assert same(student(tiny), teacher)


@pytest.mark.parametrize(("bits", "worse"), [("8-8-8", "4-8-8"), ("4-8-8", "4-8-4"), ("4-8-16", "4-4-16")])
def test_fewer_bits_are_further_from_full_precision(
    tiny: Tiny, windows: Tensor, teacher: nn.Module, bits: str, worse: str
) -> None:
    better, further = (student(tiny, LLMQATConfig(bits=setting)) for setting in (bits, worse))
    assert 0 < mean_loss(better, windows, teacher) < mean_loss(further, windows, teacher)


@pytest.mark.parametrize("name", sorted(known_archs()))
def test_every_architecture_becomes_a_student(name: str) -> None:
    arch = known_archs()[name]
    model, batches = arch.tiny()
    assert isinstance(model, transformers.PreTrainedModel)
    plain = [model(**batch).logits.detach() for batch in batches]
    prepare(model, arch, LLMQATConfig(bits="8-8-8"))
    groups = trainable_groups(model)
    for batch, logits in zip(batches, plain, strict=True):
        found = model(**batch, use_cache=False).logits
        assert 0 < (found - logits).abs().mean() < 0.1 * logits.abs().mean()
    found.square().mean().backward()
    assert all(parameter.grad is not None for group in groups for parameter in group["params"])
    language = (arch.blocks.removesuffix("layers"), "lm_head.")
    for path, parameter in model.named_parameters():  # what sees stays as it is
        assert parameter.requires_grad == path.startswith(language), path


def test_a_tied_head_is_trained_once() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    prepare(model, ARCH, CONFIG)
    (group,) = trainable_groups(model)
    assert len(group["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("bits", ["4-8", "5-8-8", "16-8-8"])
def test_bad_bits_are_refused(bits: str) -> None:
    with pytest.raises(ConfigError):
        prepare(tiny_llama(), ARCH, LLMQATConfig(bits=bits))


def test_a_group_size_that_does_not_fit_names_the_layer() -> None:
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        prepare(tiny_llama(), ARCH, LLMQATConfig(bits="4-8-8", group_size=256))


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["kl", "cross-entropy"])
def test_the_loss_goes_down(
    tiny: Tiny, windows: Tensor, teacher: transformers.PreTrainedModel, tmp_path: Path, loss: Any
) -> None:
    model, taught_by = student(tiny), teacher if loss == "kl" else None
    before = mean_loss(model, windows, taught_by)
    train(model, windows, tmp_path, replace(CONFIG, loss=loss), taught_by)
    assert mean_loss(model, windows, taught_by) < 0.9 * before


def test_the_logged_loss_is_that_of_the_student(
    tiny: Tiny, windows: Tensor, teacher: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    model = student(tiny)
    expected = mean_loss(model, windows[:4], teacher)
    first, *_ = train(model, windows[:4], tmp_path, teacher=teacher)
    assert first == pytest.approx(expected, rel=TOLERANCES["model"][torch.float32])


def test_the_gradient_is_that_of_cross_entropy_against_the_teachers_softmax(
    tiny: Tiny, windows: Tensor, teacher: nn.Module
) -> None:
    model = student(tiny)
    columns, labels = predictions_that_count(windows[:2])
    (group,) = trainable_groups(model)
    wanted = teacher(input_ids=windows[:2]).logits[:, columns]
    grads = []
    for ours in (True, False):
        model.zero_grad()
        logits = model(input_ids=windows[:2], use_cache=False).logits[:, columns]
        if ours:
            kl_divergence(logits, wanted, labels).backward()
        else:
            (-(wanted.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()).backward()
        grads.append([parameter.grad.clone() for parameter in group["params"]])
    for left, right in zip(*grads, strict=True):
        assert_close(left, right, "gradient")


def test_all_weights_are_trained(
    tiny: Tiny, windows: Tensor, teacher: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    model = student(tiny)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, windows, tmp_path, teacher=teacher)
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_recomputed_activations_give_the_same_curve(
    tiny: Tiny, windows: Tensor, teacher: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    kept = train(student(tiny), windows, tmp_path / "kept", teacher=teacher)
    again = train(
        student(tiny), windows, tmp_path / "again", replace(CONFIG, gradient_checkpointing=True), teacher=teacher
    )
    assert_close(torch.tensor(again), torch.tensor(kept), "model")


def test_a_stopped_run_is_continued(
    tiny: Tiny,
    windows: Tensor,
    teacher: transformers.PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(CONFIG, save_steps=2)
    assert_a_stopped_run_is_continued(
        monkeypatch,
        tmp_path,
        lambda: student(tiny),
        lambda model, folder: train(model, windows, folder, config, teacher),
    )


def test_no_steps_train_nothing(tiny: Tiny, windows: Tensor, tmp_path: Path, teacher: nn.Module) -> None:
    model = student(tiny)
    assert train(model, windows, tmp_path, replace(CONFIG, max_steps=0)) == []
    assert same(model, teacher)


# ---- the checkpoint ------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("bits", ["4-8-4", "8-8-8", "4-6-16", "3-16-4"])
def test_the_checkpoint_computes_what_the_student_did(
    tiny: Tiny, windows: Tensor, tmp_path: Path, bits: str, group_size: int
) -> None:
    config = replace(CONFIG, bits=bits, group_size=group_size, loss="cross-entropy", max_steps=2)
    model = student(tiny, config)
    train(model, windows, tmp_path / "trainer", config)
    wanted = logits_of(model, windows)
    opened = open_model(tiny.folder, ARCH)
    manifest = store(model, opened, config, tmp_path / "model", source="tiny", provenance={"config": {}})
    assert (manifest.stage, manifest.widths) == (STAGE, config.widths)
    loaded = load(tmp_path / "model")
    assert_close(logits_of(loaded, windows), wanted, "model")
    assert_close(logits_of(model, windows), wanted, "model")  # packed in place
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == {
        name for name, _ in loaded.named_parameters() if name.endswith(".weight_scale")
    }


def test_smoothing_comes_before_rounding(tiny: Tiny, windows: Tensor, tmp_path: Path, teacher: nn.Module) -> None:
    config = replace(CONFIG, bits="8-4-16", smooth=0.5, max_steps=0)
    model = load_model(tiny.folder, CPU)
    with torch.no_grad():
        for layer in range(3):
            model.get_submodule(f"model.layers.{layer}.input_layernorm").weight[::16] *= 30.0
    full = logits_of(model, windows)
    smooth_model(model, ARCH, [{"input_ids": window} for window in windows], config)
    assert_close(logits_of(model, windows), full, "model")
    prepare(model, ARCH, config)
    wanted = logits_of(model, windows)
    opened = open_model(tiny.folder, ARCH)
    manifest = store(model, opened, config, tmp_path, source="tiny", provenance={"config": {}})
    assert manifest.stage == ROUNDED
    assert_close(logits_of(load(tmp_path), windows), wanted, "model")
