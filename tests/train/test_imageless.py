"""Batches without images give every parameter of a projector a gradient of zero, whatever the projector takes."""

from __future__ import annotations

import pytest
import torch

from eqat_mm.train.imageless import adding_nothing, blank_image, through
from llava_adapters import arch_for
from llava_adapters.tiny import tiny_llava


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "mistral3", "idefics3"])
def test_text_alone_leaves_the_projector_where_it_is(name: str) -> None:
    model, batches = arch_for(name).tiny()
    projector = arch_for(name).find_projector(model)
    assert projector is not None
    text = batches[-1]
    expected = model(**text, use_cache=False).logits
    with adding_nothing(model, through(projector)):
        logits = model(**text, use_cache=False).logits
    logits.square().mean().backward()
    assert torch.equal(logits, expected)
    gradients = [parameter.grad for parameter in projector.parameters()]
    assert gradients
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_the_blank_image_has_all_that_belongs_to_one() -> None:
    _, batches = tiny_llava("llama")
    sample = {"input_ids": batches[0]["input_ids"][0], "pixel_values": batches[0]["pixel_values"][:1]}
    blank = blank_image(sample | {"batch_num_images": torch.tensor([1]), "image_sizes": torch.tensor([[16, 16]])})
    assert set(blank) == {"pixel_values", "batch_num_images", "image_sizes"}
    assert not blank["pixel_values"].any()
    assert blank["image_sizes"].tolist() == [[16, 16]]
