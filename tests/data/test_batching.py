"""Every sample comes once an epoch, near others of its length; a warm-up begins with text; padding is masked."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from eqat_mm.data.image_text.batching import Collator, SampleOrder
from eqat_mm.data.image_text.chat import IGNORED
from eqat_mm.errors import DataError
from tests.data.tiny_processor import tiny_tokenizer

COUNT, BATCH = 400, 8
LENGTHS = torch.randint(10, 1000, (COUNT,), generator=torch.Generator().manual_seed(0)).tolist()
TEXT = [index % 4 == 0 for index in range(COUNT)]


def _order(**options: int) -> SampleOrder:
    return SampleOrder(LENGTHS, TEXT, BATCH, **{"seed": 0, **options})


def _steps(order: SampleOrder, epoch: int = 0) -> list[list[int]]:
    indices = order.indices(epoch)
    return [indices[start : start + BATCH] for start in range(0, COUNT, BATCH)]


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("epoch", [0, 1])
def test_every_sample_comes_once(warmup: int, epoch: int) -> None:
    assert sorted(_order(text_warmup_steps=warmup).indices(epoch)) == list(range(COUNT))


def test_samples_of_a_step_are_of_similar_length() -> None:
    spread = [max(LENGTHS[i] for i in step) - min(LENGTHS[i] for i in step) for step in _steps(_order())]
    assert sum(spread) / len(spread) < 200  # of 990; at random about 770


def test_order_is_a_function_of_seed_and_epoch() -> None:
    assert _order().indices(3) == _order().indices(3)
    assert len({tuple(_order(seed=seed).indices(epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    state = torch.get_rng_state()
    _order(text_warmup_steps=5).indices(0)
    assert torch.equal(state, torch.get_rng_state())


def test_the_share_of_text_falls_linearly() -> None:
    steps = _steps(_order(text_warmup_steps=16))
    texts = [sum(TEXT[index] for index in step) for step in steps]
    assert texts[:16] == [round(BATCH * (1 - step / 16)) for step in range(16)]
    assert texts[0] == BATCH
    assert any(texts[16:])  # text that is left comes afterwards, among the images
    for step in steps[:16]:
        lengths = [LENGTHS[index] for index in step]
        assert lengths == sorted(lengths, reverse=True)


def test_the_warm_up_is_in_the_first_epoch() -> None:
    order = _order(text_warmup_steps=16)
    assert order.indices(1) == _order().indices(1)
    assert order.indices(0) != _order().indices(0)


def test_a_warm_up_may_take_all_samples() -> None:
    order = SampleOrder([1] * 4, [True, True, True, False], 2, seed=0, text_warmup_steps=2)
    indices = order.indices(0)
    assert sorted(indices) == [0, 1, 2, 3]
    assert 3 in indices[2:]


def test_too_little_text_for_the_warm_up_is_said() -> None:
    with pytest.raises(DataError) as caught:
        _order(text_warmup_steps=40)
    assert caught.value.given == "100 samples without images and 300 with"
    assert caught.value.allowed.startswith("at least 164 and 156")


def test_a_loader_follows_the_epoch() -> None:
    order = _order()
    loader = DataLoader(list(range(COUNT)), batch_size=4, sampler=order)  # type: ignore[arg-type]
    seen = []
    for epoch in range(2):
        order.set_epoch(epoch)
        seen.append([index for batch in loader for index in batch.tolist()])
    assert seen == [order.indices(0), order.indices(1)]
    assert len(order) == COUNT


def _sample(length: int, **images: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(10, 10 + length), "labels": torch.arange(20, 20 + length), **images}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_and_not_predicted(side: str) -> None:
    batch = Collator(tiny_tokenizer(), side)([_sample(2), _sample(4)])
    padded = slice(0, 2) if side == "left" else slice(2, 4)
    kept = slice(2, 4) if side == "left" else slice(0, 2)
    assert batch["input_ids"][0, padded].tolist() == [tiny_tokenizer().pad_token_id] * 2
    assert batch["labels"][0, padded].tolist() == [IGNORED] * 2
    assert batch["attention_mask"][0, padded].tolist() == [0, 0]
    assert batch["input_ids"][0, kept].tolist() == [10, 11]
    assert batch["labels"][0, kept].tolist() == [20, 21]
    assert batch["attention_mask"].sum(1).tolist() == [2, 4]
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_the_side_is_the_tokenizers_unless_told() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    tokenizer.pad_token = None
    assert Collator(tokenizer)([_sample(1), _sample(2)])["attention_mask"].tolist() == [[0, 1], [1, 1]]
    assert Collator(tokenizer, "right")([_sample(1), _sample(2)])["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_images_of_all_samples_are_joined_in_order() -> None:
    one, two = torch.ones(1, 3, 4, 4), 2 * torch.ones(2, 3, 4, 4)
    batch = Collator(tiny_tokenizer())([_sample(2, pixel_values=one), _sample(2), _sample(2, pixel_values=two)])
    assert batch["pixel_values"].shape == (3, 3, 4, 4)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1, 2, 2]


def test_tiles_are_filled_up() -> None:
    few, many = torch.ones(1, 3, 3, 4, 4), torch.ones(2, 5, 3, 4, 4)
    sizes = torch.tensor([[4, 8]]), torch.tensor([[8, 8], [8, 4]])
    samples = [_sample(2, pixel_values=p, image_sizes=s) for p, s in zip((few, many), sizes, strict=True)]
    batch = Collator(tiny_tokenizer())(samples)
    assert batch["pixel_values"].shape == (3, 5, 3, 4, 4)
    assert batch["pixel_values"].sum((1, 2, 3, 4)).tolist() == [3 * 48, 5 * 48, 5 * 48]
    assert batch["image_sizes"].tolist() == [[4, 8], [8, 8], [8, 4]]


def test_images_of_different_sizes_are_filled_up() -> None:
    wide, high = torch.ones(2, 3, 4, 8), torch.ones(1, 3, 6, 4)
    batch = Collator(tiny_tokenizer())([_sample(2, pixel_values=wide), _sample(2, pixel_values=high)])
    assert batch["pixel_values"].shape == (3, 3, 6, 8)
    assert batch["pixel_values"].sum((1, 2, 3)).tolist() == [96, 96, 72]
    assert batch["pixel_values"][2, 0, :, 4:].sum() == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_other_rows_are_padded_as_tokens_are(side: str) -> None:
    kinds = {"mm_token_type_ids": torch.tensor([1, 1, 1]), "cross_attention_mask": torch.ones(3, 2)}
    more = {"mm_token_type_ids": torch.tensor([1] * 5), "cross_attention_mask": torch.ones(5, 1)}
    batch = Collator(tiny_tokenizer(), side)([_sample(3, **kinds), _sample(4), _sample(5, **more)])
    assert batch["mm_token_type_ids"].sum(1).tolist() == [3, 0, 5]
    assert torch.equal(batch["mm_token_type_ids"][0], batch["attention_mask"][0])
    assert batch["cross_attention_mask"].shape == (3, 5, 2)
    assert batch["cross_attention_mask"].sum((1, 2)).tolist() == [6, 0, 5]


def test_numbers_of_images_are_joined() -> None:
    one, two = {"batch_num_images": torch.tensor([1])}, {"batch_num_images": torch.tensor([2])}
    assert Collator(tiny_tokenizer())([_sample(3, **one), _sample(2), _sample(4, **two)])[
        "batch_num_images"
    ].tolist() == [1, 2]
