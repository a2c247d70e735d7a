"""Rows of tokens and what belongs to images are told apart, whatever the processor calls them."""

from __future__ import annotations

import pytest
import torch

from eqat_mm.data.image_text.columns import alone, images_of, rows_of, taken_apart
from eqat_mm.errors import ConfigError

IDS = [[5, 6, 7, 8]]


def found() -> dict[str, object]:
    """What processors return of one text: lists and tensors."""
    return {
        "input_ids": IDS,
        "mm_token_type_ids": [[0, 1, 1, 0]],
        "cross_attention_mask": torch.ones(1, 4, 2, 3),
        "pixel_values": torch.ones(4, 12),
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
        "batch_num_images": torch.tensor([1]),
        "labels": [[-100] * 4],
        "text_replacement_offsets": [[{"span": (0, 1)}]],
    }


def test_all_but_labels_is_kept_and_rows_lose_the_axis_of_samples() -> None:
    parts = taken_apart(found(), "P")
    assert parts.pop("text_replacement_offsets") == [{"span": (0, 1)}]
    assert {name: tuple(value.shape) for name, value in parts.items()} == {
        "input_ids": (4,),
        "mm_token_type_ids": (4,),
        "cross_attention_mask": (4, 2, 3),
        "pixel_values": (4, 12),
        "image_grid_thw": (1, 3),
        "batch_num_images": (1,),
    }


def test_a_sample_is_rows_and_what_belongs_to_images() -> None:
    sample = taken_apart(found() | {"text_replacement_offsets": []}, "P")
    assert set(rows_of(sample)) == {"input_ids", "mm_token_type_ids", "cross_attention_mask"}
    assert set(images_of(sample)) == {"pixel_values", "image_grid_thw", "batch_num_images"}
    batch = alone(sample)
    assert batch["input_ids"].tolist() == IDS
    assert batch["cross_attention_mask"].shape == (1, 4, 2, 3)
    assert batch["pixel_values"] is sample["pixel_values"]


@pytest.mark.parametrize(
    "value", [[torch.ones(2), torch.ones(3)], [["a"], [1, 2]], object()], ids=["uneven", "mixed", "object"]
)
def test_what_is_no_tensor_is_refused_by_name(value: object) -> None:
    with pytest.raises(ConfigError, match="image_patches") as caught:
        taken_apart({"input_ids": IDS, "image_patches": value}, "FuyuProcessor")
    assert caught.value.where == "processor FuyuProcessor"
