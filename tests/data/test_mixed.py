"""Windows of text behind conversations: which sample is what, and how many there are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eqat_mm.data.batching import Collator, SampleOrder
from eqat_mm.data.mixed import Mixed, windows_beside
from tests.tiny_model import word_tokenizer

WINDOWS = torch.arange(24).reshape(3, 8)


class Five(list[Any]):
    """Conversations of 3 to 7 tokens, every other about an image."""

    lengths = (3, 4, 5, 6, 7)
    text_only = (False, True, False, True, False)


def mixed() -> Mixed:
    rows = [{"input_ids": torch.full((n,), n), "labels": torch.full((n,), -100)} for n in Five.lengths]
    return Mixed(Five(rows), WINDOWS)


def test_windows_are_samples_without_images_behind_the_conversations() -> None:
    data = mixed()
    assert len(data) == 8
    assert data.lengths == [3, 4, 5, 6, 7, 8, 8, 8]
    assert data.text_only == [False, True, False, True, False, True, True, True]
    assert data[4]["input_ids"].tolist() == [7] * 7
    for index, window in enumerate(WINDOWS):
        assert torch.equal(data[5 + index]["input_ids"], window)
        assert torch.equal(data[5 + index]["labels"], window)


def test_both_kinds_are_in_one_batch_and_in_the_warm_up() -> None:
    data = mixed()
    batch = Collator(word_tokenizer(), "right")([data[0], data[5]])
    assert batch["labels"].tolist() == [[-100] * 8, list(range(8))]
    assert batch["attention_mask"].sum(1).tolist() == [3, 8]
    order = SampleOrder(data.lengths, data.text_only, 4, seed=0, text_warmup_steps=1)
    assert all(data.text_only[index] for index in order.indices(0)[:4])
    assert sorted(order.indices(0)) == list(range(8))


@pytest.mark.parametrize(("share", "windows"), [(0.5, 900), (0.1, 100), (0.25, 300), (1e-9, 1), (0.9, 8100)])
def test_a_share_is_of_all_samples(share: float, windows: int) -> None:
    assert windows_beside(900, share) == windows


@given(st.integers(1, 10**6), st.floats(0.001, 0.999))
def test_no_other_number_of_windows_is_nearer(conversations: int, share: float) -> None:
    def off(count: int) -> float:
        return abs(count - share * (count + conversations))

    count = windows_beside(conversations, share)
    assert count >= 1
    assert all(off(count) <= off(other) + 1e-6 * conversations for other in (count - 1, count + 1) if other)


def test_the_number_of_conversations_may_be_any_sized_thing() -> None:
    assert len(Mixed(SimpleNamespace(lengths=[], text_only=[]), WINDOWS)) == 3
