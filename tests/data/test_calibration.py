"""Samples of a calibration: filled up to few lengths, mixed with windows of text, each a batch of one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from eqat_mm.data.image_text.batching import Collator
from eqat_mm.data.image_text.calibration import CalibrationSamples, filled_length

PAD = 7
TOKENIZER: Any = SimpleNamespace(pad_token_id=PAD, eos_token_id=1, padding_side="left")


class Talks(list[dict[str, Tensor]]):
    @property
    def lengths(self) -> list[int]:
        return [len(sample["input_ids"]) for sample in self]

    @property
    def text_only(self) -> list[bool]:
        return [length == 17 for length in self.lengths]


def talk(tokens: int) -> dict[str, Tensor]:
    ids = torch.arange(100, 100 + tokens)
    labels = torch.where(ids < 105, -100, ids)
    return {"input_ids": ids, "labels": labels, "kinds": torch.ones(tokens, 3), "pixel_values": torch.ones(2, 3)}


@pytest.fixture
def samples() -> CalibrationSamples:
    windows = torch.arange(60).view(3, 20)
    return CalibrationSamples(Talks(talk(n) for n in (9, 17, 33, 40)), windows, Collator(TOKENIZER), seed=1)


@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (15, 15), (17, 18), (33, 36), (850, 896), (2048, 2048)])
def test_lengths_are_few(tokens: int, length: int) -> None:
    assert filled_length(tokens) == length


def test_at_most_an_eighth_is_filling_and_eight_lengths_double() -> None:
    assert all(n <= filled_length(n) <= n * 9 / 8 for n in range(1, 3000))
    assert len({filled_length(n) for n in range(1025, 2049)}) == 8


def test_conversations_and_windows_come_in_a_drawn_order(samples: CalibrationSamples) -> None:
    assert sorted(samples.lengths) == [9, 18, 20, 20, 20, 36, 40]
    assert [samples[index]["input_ids"].shape for index in range(7)] == [(1, length) for length in samples.lengths]
    first = [int(samples[index]["input_ids"][0, 0]) for index in range(7)]
    assert sorted(first) == [0, 20, 40, 100, 100, 100, 100]
    assert first != sorted(first)


def test_a_conversation_is_filled_up_on_the_right(samples: CalibrationSamples) -> None:
    found = samples.labelled(samples.lengths.index(18))
    assert found["input_ids"].tolist() == [[*range(100, 117), PAD]]
    assert found["labels"].tolist() == [[-100] * 5 + [*range(105, 117), -100]]
    assert found["attention_mask"].tolist() == [[1] * 17 + [0]]
    assert found["kinds"][0, -1].tolist() == [0, 0, 0]
    assert found["kinds"].shape == (1, 18, 3)
    assert found["pixel_values"].shape == (2, 3)


def test_the_model_is_given_no_labels(samples: CalibrationSamples) -> None:
    assert all("labels" not in samples[index] for index in range(7))
    window = samples.labelled(samples.lengths.index(20))
    assert torch.equal(window["labels"], window["input_ids"])


def test_those_with_images(samples: CalibrationSamples) -> None:
    assert sorted(samples.lengths[index] for index in samples.with_images(9)) == [9, 36, 40]
    assert samples.with_images(2) == samples.with_images(9)[:2]
