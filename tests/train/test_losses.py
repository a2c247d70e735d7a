"""Every loss against its formula, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eqat_mm.train.losses import IGNORED, block_loss, next_token_cross_entropy, next_token_kl
from tests.tolerances import assert_close

BATCH, LENGTH, WORDS = 3, 7, 11


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(BATCH, LENGTH, WORDS) * 3


@pytest.fixture
def teacher() -> Tensor:
    return torch.randn(BATCH, LENGTH, WORDS) * 3


@pytest.fixture
def labels() -> Tensor:
    labels = torch.randint(0, WORDS, (BATCH, LENGTH))
    labels[0, :4] = IGNORED
    labels[2, 5] = IGNORED
    return labels


def log_probabilities(row: Tensor) -> list[float]:
    values = row.double().tolist()
    norm = math.log(sum(math.exp(value) for value in values))
    return [value - norm for value in values]


def positions(labels: Tensor) -> list[tuple[int, int]]:
    """(sample, position of the logits) of every label that counts."""
    return [(b, t - 1) for b in range(BATCH) for t in range(1, LENGTH) if labels[b, t] != IGNORED]


def naive_cross_entropy(logits: Tensor, labels: Tensor) -> float:
    return sum(-log_probabilities(logits[b, t])[int(labels[b, t + 1])] for b, t in positions(labels))


def naive_kl(logits: Tensor, teacher: Tensor, labels: Tensor) -> float:
    total = 0.0
    for b, t in positions(labels):
        student_row, teacher_row = log_probabilities(logits[b, t]), log_probabilities(teacher[b, t])
        total += sum(math.exp(q) * (q - p) for q, p in zip(teacher_row, student_row, strict=True))
    return total


def float64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_block_loss_is_the_mean_square(logits: Tensor, teacher: Tensor) -> None:
    expected = (logits.double() - teacher.double()).square().mean()
    assert_close(block_loss(logits, teacher), expected, "matmul")


def test_block_loss_is_computed_in_float32(logits: Tensor, teacher: Tensor) -> None:
    halves = block_loss(logits.bfloat16(), teacher.bfloat16())
    assert halves.dtype is torch.float32
    assert torch.equal(halves, block_loss(logits.bfloat16().float(), teacher.bfloat16().float()))


def test_cross_entropy_is_the_mean_over_labels_that_count(logits: Tensor, labels: Tensor) -> None:
    expected = naive_cross_entropy(logits, labels) / len(positions(labels))
    assert_close(next_token_cross_entropy(logits, labels), float64(expected), "matmul")


def test_kl_is_from_the_teacher_to_the_student(logits: Tensor, teacher: Tensor, labels: Tensor) -> None:
    expected = naive_kl(logits, teacher, labels) / len(positions(labels))
    assert_close(next_token_kl(logits, teacher, labels), float64(expected), "matmul")


def test_kl_to_itself_is_zero_and_the_teacher_gets_no_gradient(teacher: Tensor, labels: Tensor) -> None:
    student, wanted = teacher.clone().requires_grad_(), teacher.clone().requires_grad_()
    loss = next_token_kl(student, wanted, labels)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None
    assert wanted.grad is None


@pytest.mark.parametrize("count", [32, torch.tensor(32)], ids=["int", "tensor"])
def test_count_replaces_the_number_of_labels(
    logits: Tensor, teacher: Tensor, labels: Tensor, count: Tensor | int
) -> None:
    entropy, kl = naive_cross_entropy(logits, labels) / 32, naive_kl(logits, teacher, labels) / 32
    assert_close(next_token_cross_entropy(logits, labels, count), float64(entropy), "matmul")
    assert_close(next_token_kl(logits, teacher, labels, count), float64(kl), "matmul")


def test_parts_of_a_batch_add_up_to_the_whole(logits: Tensor, labels: Tensor) -> None:
    count = len(positions(labels))
    parts = [next_token_cross_entropy(logits[b : b + 1], labels[b : b + 1], count) for b in range(BATCH)]
    assert_close(torch.stack(parts).sum(), next_token_cross_entropy(logits, labels), "matmul")


def test_ignored_positions_get_no_gradient(logits: Tensor, labels: Tensor) -> None:
    logits.requires_grad_()
    next_token_cross_entropy(logits, labels).backward()
    assert logits.grad is not None
    reached = {(b, t) for b in range(BATCH) for t in range(LENGTH) if logits.grad[b, t].any()}
    assert reached == set(positions(labels))
