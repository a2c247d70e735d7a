"""Every loss against its formula, written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eqat_mm.train import losses
from eqat_mm.train.losses import (
    IGNORED,
    BlockLoss,
    block_loss,
    cross_entropy,
    kl_divergence,
    predictions_that_count,
    token_weights,
)
from tests.tolerances import assert_close

BATCH, ROWS, WORDS = 3, 6, 11


@pytest.fixture(params=[1, 4, 1000], ids=["row-by-row", "ragged-chunks", "one-chunk"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the rows into chunks of this many."""
    monkeypatch.setitem(losses.CHUNK, "cpu", request.param * WORDS)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(BATCH, ROWS, WORDS) * 3


@pytest.fixture
def teacher() -> Tensor:
    return torch.randn(BATCH, ROWS, WORDS) * 3


@pytest.fixture
def labels() -> Tensor:
    labels = torch.randint(0, WORDS, (BATCH, ROWS))
    labels[0, :4] = IGNORED
    labels[2, 5] = IGNORED
    return labels


def naive_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the labels that count, float64, by torch's own operators."""
    keep = labels != IGNORED
    return -logits.double().log_softmax(-1)[keep].gather(-1, labels[keep].unsqueeze(-1)).sum()


def naive_kl(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    keep = labels != IGNORED
    log_p, log_q = logits.double().log_softmax(-1)[keep], teacher.double().log_softmax(-1)[keep]
    return (log_q.exp() * (log_q - log_p)).sum()


def test_block_loss_is_the_mean_square(logits: Tensor, teacher: Tensor) -> None:
    expected = (logits.double() - teacher.double()).square().mean()
    assert_close(block_loss(logits, teacher), expected, "matmul")


def test_block_loss_is_computed_in_float32(logits: Tensor, teacher: Tensor) -> None:
    halves = block_loss(logits.bfloat16(), teacher.bfloat16())
    assert halves.dtype is torch.float32
    assert torch.equal(halves, block_loss(logits.bfloat16().float(), teacher.bfloat16().float()))


def test_tokens_with_huge_activations_do_not_decide_alone() -> None:
    """A token of energy e counts min(1, median(e) / e)."""
    hidden = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [300.0, 300.0], [0.0, 1.0]])
    weights = torch.tensor([[1.0], [1.0], [4 / 9], [4 / 9e4], [1.0]])
    assert_close(token_weights(hidden), weights, "elementwise")
    output = hidden + 0.5
    assert_close(block_loss(output[None], hidden[None], "balanced"), (weights * 0.25).mean(), "elementwise")


def test_position_t_is_predicted_from_the_one_before() -> None:
    labels = torch.tensor([[5, IGNORED, 7, 8, IGNORED, IGNORED], [IGNORED, IGNORED, IGNORED, 9, 4, IGNORED]])
    columns, following = predictions_that_count(labels)
    assert torch.equal(columns, torch.tensor([1, 2, 3]))
    assert torch.equal(following, torch.tensor([[7, 8, IGNORED], [IGNORED, 9, 4]]))


def test_all_columns_but_the_last_predict_plain_text() -> None:
    columns, following = predictions_that_count(labels := torch.randint(0, WORDS, (2, 9)))
    assert torch.equal(columns, torch.arange(8))
    assert torch.equal(following, labels[:, 1:])


@pytest.mark.usefixtures("chunks")
def test_cross_entropy_and_its_gradient(logits: Tensor, labels: Tensor) -> None:
    count = int((labels != IGNORED).sum())
    logits.requires_grad_()
    expected = naive_cross_entropy(logits, labels) / count
    (gradient,) = torch.autograd.grad(expected * 3, logits)
    loss = cross_entropy(logits, labels)
    assert_close(loss, expected, "matmul")
    assert_close(torch.autograd.grad(loss * 3, logits)[0], gradient.double(), "matmul")


@pytest.mark.usefixtures("chunks")
def test_kl_is_from_the_teacher_to_the_student(logits: Tensor, teacher: Tensor, labels: Tensor) -> None:
    count = int((labels != IGNORED).sum())
    logits.requires_grad_()
    expected = naive_kl(logits, teacher, labels) / count
    (gradient,) = torch.autograd.grad(expected * 3, logits)
    loss = kl_divergence(logits, teacher, labels)
    assert_close(loss, expected, "matmul")
    assert_close(torch.autograd.grad(loss * 3, logits)[0], gradient.double(), "matmul")


def test_kl_to_itself_is_zero_and_the_teacher_gets_no_gradient(teacher: Tensor, labels: Tensor) -> None:
    student, wanted = teacher.clone().requires_grad_(), teacher.clone().requires_grad_()
    loss = kl_divergence(student, wanted, labels)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None
    assert not student.grad.any()
    assert wanted.grad is None


@pytest.mark.parametrize("count", [32, torch.tensor(32)], ids=["int", "tensor"])
def test_count_replaces_the_number_of_labels(
    logits: Tensor, teacher: Tensor, labels: Tensor, count: Tensor | int
) -> None:
    entropy, kl = naive_cross_entropy(logits, labels) / 32, naive_kl(logits, teacher, labels) / 32
    assert_close(cross_entropy(logits, labels, count), entropy, "matmul")
    assert_close(kl_divergence(logits, teacher, labels, count), kl, "matmul")


def test_parts_of_a_batch_add_up_to_the_whole(logits: Tensor, labels: Tensor) -> None:
    count = int((labels != IGNORED).sum())
    parts = [cross_entropy(logits[b : b + 1], labels[b : b + 1], count) for b in range(BATCH)]
    assert_close(torch.stack(parts).sum(), cross_entropy(logits, labels), "matmul")


def test_ignored_positions_get_no_gradient(logits: Tensor, labels: Tensor) -> None:
    logits.requires_grad_()
    cross_entropy(logits, labels).backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.any(-1), labels != IGNORED)


def test_the_gradient_has_the_dtype_of_the_logits(logits: Tensor, teacher: Tensor, labels: Tensor) -> None:
    halves = logits.bfloat16().requires_grad_()
    kl_divergence(halves, teacher.bfloat16(), labels).backward()
    assert halves.grad is not None
    assert halves.grad.dtype is torch.bfloat16


@pytest.mark.parametrize(("device", "rows"), [("cpu", 131), ("cuda", 524), ("meta", 131)])
def test_how_many_rows_are_float32_at_a_time(device: str, rows: int) -> None:
    """Of a vocabulary of 32,000 words."""
    assert losses.rows_of_a_chunk(32000, torch.device(device)) == rows


def test_tokens_that_count_nothing_are_as_if_they_were_not_there() -> None:
    draw = torch.Generator().manual_seed(3)
    output, target = (torch.randn(2, 6, 8, generator=draw) for _ in range(2))
    target[0, 5] *= 1e3  # would move the median, and the mean
    weights = torch.tensor([[1.0, 2, 0, 1, 1, 0], [0, 1, 1, 1, 0, 3]])
    counted = weights > 0
    errors = (output - target).square().mean(-1)[counted]
    assert_close(
        block_loss(output, target, weights_BT=weights),
        (errors * weights[counted]).sum() / weights.sum(),
        "elementwise",
    )
    shares = token_weights(target[counted]).squeeze(-1)
    assert_close(
        token_weights(target, weights_T=weights)[counted].squeeze(-1), shares * weights[counted], "elementwise"
    )
    expected = (errors * shares * weights[counted]).sum() / weights.sum()
    assert_close(block_loss(output, target, "balanced", weights_BT=weights), expected, "elementwise")


@pytest.mark.parametrize("kind", ["mse", "balanced"])
def test_weights_of_one_change_nothing(kind: BlockLoss) -> None:
    draw = torch.Generator().manual_seed(3)
    output, target = (torch.randn(2, 6, 8, generator=draw) for _ in range(2))
    assert_close(
        block_loss(output, target, kind, weights_BT=torch.ones(2, 6)), block_loss(output, target, kind), "model"
    )
