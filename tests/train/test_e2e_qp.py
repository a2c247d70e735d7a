"""E2E-QP on a tiny packed model: the step sizes are trained, and nothing else."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from eqat_mm.checkpoint.read import load
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.train.e2e_qp import (
    E2EQPConfig,
    E2EQPTrainer,
    run_e2e_qp,
    scale_parameters,
    trainable_groups,
)
from eqat_mm.train.end_to_end import WindowDataset, training_arguments
from tests.tolerances import TOLERANCES, assert_close
from tests.train.problems import CPU, mean_loss, same
from tests.train.stopping import assert_a_stopped_run_is_continued

CLOSE = TOLERANCES["model"][torch.float32]
CONFIG = E2EQPConfig(
    learning_rate=2e-3, max_steps=6, batch_size=4, accumulation=1, logging_steps=1, precision="float32"
)


@pytest.fixture
def model(packed: Path) -> transformers.PreTrainedModel:
    return load(packed)


def train(
    model: transformers.PreTrainedModel,
    windows: Tensor,
    folder: Path,
    config: E2EQPConfig = CONFIG,
    teacher: nn.Module | None = None,
) -> list[float]:
    """Train; returns the loss of every optimizer step."""
    arguments = training_arguments(config, folder, CPU)
    log = run_e2e_qp(model, WindowDataset(windows), config, arguments, teacher=teacher)
    return [record["loss"] for record in log if "loss" in record]


def scales_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(".weight_scale")}


@pytest.mark.parametrize("loss", ["cross-entropy", "kl"])
def test_the_loss_goes_down(
    model: transformers.PreTrainedModel,
    teacher: transformers.PreTrainedModel,
    windows: Tensor,
    tmp_path: Path,
    loss: Any,
) -> None:
    taught_by = teacher if loss == "kl" else None
    before = mean_loss(model, windows, taught_by)
    train(model, windows, tmp_path, replace(CONFIG, loss=loss), taught_by)
    assert mean_loss(model, windows, taught_by) < before - 0.05


def test_only_step_sizes_get_gradients(
    model: transformers.PreTrainedModel, teacher: transformers.PreTrainedModel, windows: Tensor, tmp_path: Path
) -> None:
    arguments = training_arguments(CONFIG, tmp_path, CPU)
    groups = trainable_groups(model, None, CONFIG)
    data = WindowDataset(windows)
    trainer = E2EQPTrainer(model=model, args=arguments, groups=groups, train_dataset=data, teacher=teacher)
    batch = {"input_ids": windows[:2], "labels": windows[:2]}
    trainer.compute_loss(model, batch).backward()
    names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert names == scales_of(model).keys()
    assert all(parameter.grad.any() for parameter in scale_parameters(model))  # type: ignore[union-attr]
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_optimizer_holds_the_step_sizes_alone(
    model: transformers.PreTrainedModel, windows: Tensor, tmp_path: Path
) -> None:
    arguments = training_arguments(CONFIG, tmp_path, CPU)
    groups = trainable_groups(model, None, CONFIG)
    data = WindowDataset(windows)
    optimizer = E2EQPTrainer(model=model, args=arguments, groups=groups, train_dataset=data).create_optimizer()
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for name, parameter in model.named_parameters() if name.endswith(".weight_scale")}
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)


def test_nothing_but_step_sizes_changes(model: transformers.PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, windows, tmp_path)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == scales_of(model).keys()


def test_step_sizes_are_rounded_to_what_is_stored(
    model: transformers.PreTrainedModel, windows: Tensor, tmp_path: Path
) -> None:
    train(model, windows, tmp_path)
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(linears) == 3 * 7
    for linear in linears:
        assert linear.weight_scale.dtype is torch.float32
        assert torch.equal(linear.weight_scale, linear.weight_scale.bfloat16().float())


def test_the_logged_loss_is_the_mean_per_predicted_token(
    model: transformers.PreTrainedModel, windows: Tensor, tmp_path: Path
) -> None:
    expected = mean_loss(model, windows[:4], None)
    first, *_ = train(model, windows[:4], tmp_path)
    assert first == pytest.approx(expected, rel=CLOSE)


@pytest.mark.parametrize("loss", ["cross-entropy", "kl"])
def test_accumulated_batches_are_one_larger_batch(
    packed: Path, teacher: transformers.PreTrainedModel, windows: Tensor, tmp_path: Path, loss: Any
) -> None:
    taught_by = teacher if loss == "kl" else None
    curves = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        config = replace(CONFIG, loss=loss, batch_size=batch_size, accumulation=accumulation)
        folder = tmp_path / f"{batch_size}x{accumulation}"
        curves.append(torch.tensor(train(load(packed), windows, folder, config, taught_by)))
    assert len(curves[0]) == CONFIG.max_steps
    for curve in curves[1:]:
        assert_close(curve, curves[0], "model")


def test_recomputed_activations_give_the_same_curve(packed: Path, windows: Tensor, tmp_path: Path) -> None:
    kept = train(load(packed), windows, tmp_path / "kept")
    again = train(load(packed), windows, tmp_path / "again", replace(CONFIG, gradient_checkpointing=True))
    assert_close(torch.tensor(again), torch.tensor(kept), "model")


def test_unquantized_parts_in_bfloat16_give_nearly_the_same_curve(
    packed: Path, teacher: transformers.PreTrainedModel, windows: Tensor, tmp_path: Path
) -> None:
    """As on a GPU: hidden states are bfloat16, step sizes float32."""
    full = train(load(packed), windows, tmp_path / "full", replace(CONFIG, loss="kl"), teacher)
    model = load(packed, dtype="bfloat16")
    between: set[torch.dtype] = set()
    for block in model.model.layers:  # type: ignore[union-attr]
        block.register_forward_hook(lambda _block, _inputs, output: between.add(output.dtype))
    config = replace(CONFIG, loss="kl", precision="bfloat16")
    halves = train(model, windows, tmp_path / "halves", config, copy.deepcopy(teacher).bfloat16())
    assert between == {torch.bfloat16}
    assert {parameter.dtype for parameter in scale_parameters(model)} == {torch.float32}
    assert model.model.embed_tokens.weight.dtype is torch.bfloat16  # type: ignore[union-attr]
    assert_close(torch.tensor(halves), torch.tensor(full), "model", torch.bfloat16)


def test_two_runs_give_the_same_step_sizes(packed: Path, windows: Tensor, tmp_path: Path) -> None:
    first, second = load(packed), load(packed)
    train(first, windows, tmp_path / "first")
    torch.manual_seed(99)
    train(second, windows, tmp_path / "second")
    assert same(first, second)


def test_a_stopped_run_is_continued(
    packed: Path, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, save_steps=2)
    assert_a_stopped_run_is_continued(
        monkeypatch, tmp_path, lambda: load(packed), lambda model, folder: train(model, windows, folder, config)
    )


def test_checkpoints_to_resume_from_are_kept_only_on_request(packed: Path, windows: Tensor, tmp_path: Path) -> None:
    train(load(packed), windows, tmp_path / "none", replace(CONFIG, save_steps=0))
    train(load(packed), windows, tmp_path / "some", replace(CONFIG, save_steps=1))
    assert list((tmp_path / "none").glob("checkpoint-*")) == []
    assert {path.name for path in (tmp_path / "some").glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-6"}


def test_windows_are_their_own_labels(windows: Tensor) -> None:
    data = WindowDataset(windows)
    assert len(data) == len(windows)
    assert torch.equal(data[3]["input_ids"], windows[3])
    assert torch.equal(data[3]["labels"], windows[3])
