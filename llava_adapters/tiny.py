"""Small random models and batches with which adapters are tested."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from eqat_mm.blocks.arch import Inputs

VOCABULARY = 97
IMAGE_TOKEN = VOCABULARY - 1
"""Stands for one token of an image; no text holds it."""

IMAGE_SIZE = 16
"""Height and width of what the vision tower sees: 2 x 2 patches of 8 pixels."""

TILES = [[16, 32], [32, 16], [32, 32]]
"""Height and width of the grids of tiles that a tiny LLaVA-1.6 cuts images into."""


def tiny_config(model_type: str, **overrides: Any) -> transformers.PreTrainedConfig:
    """Return the configuration of a two-block language model: hidden 64, MLP 128, 4 heads, 2 KV heads, vocabulary 97.

    Args:
        model_type: as in config.json.
        overrides: fields of the configuration.
    """
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config: transformers.PreTrainedConfig = transformers.AutoConfig.for_model(model_type, **(fields | overrides))
    return config


def tiny_vision_config(image_size: int = IMAGE_SIZE, patch_size: int = 8) -> transformers.CLIPVisionConfig:
    """Return the configuration of a three-block vision tower: hidden 32, MLP 64, 2 heads; sizes are in pixels."""
    return transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
    )


def tiny_causal_lm(model_type: str, **overrides: Any) -> tuple[nn.Module, list[Inputs]]:
    """Return a random language model of `tiny_config` in eval mode, and its batches, `text_batches`."""
    return random_model(transformers.AutoModelForCausalLM, tiny_config(model_type, **overrides)), text_batches()


def tiny_llava(tower: str, **overrides: Any) -> tuple[nn.Module, list[Inputs]]:
    """Return a random LLaVA-1.5 and its batches.

    Args:
        tower: model type of the language tower.
        overrides: fields of the configuration of the tower, `tiny_config`.

    Returns:
        The model in eval mode, and batches of three samples with two images, one and none: unpadded, padded on the
        left, padded on the right; then those of `text_batches`.
    """
    generator = torch.Generator().manual_seed(2)
    images = {"pixel_values": torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)}
    return _tiny_vlm("llava", images, tiny_config(tower, **overrides))


def tiny_llava_next(tower: str, **overrides: Any) -> tuple[nn.Module, list[Inputs]]:
    """Return a random LLaVA-1.6 and its batches; like `tiny_llava`, with images of different size and tiling."""
    generator = torch.Generator().manual_seed(2)
    images = {
        "pixel_values": torch.randn(3, 5, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        "image_sizes": torch.tensor([[16, 32], [20, 32], [32, 12]]),
    }
    return _tiny_vlm("llava_next", images, tiny_config(tower, **overrides), image_grid_pinpoints=TILES)


def text_batches() -> list[Inputs]:
    """Return three batches of 3 x 10 token ids: unpadded, left-padded and right-padded."""
    tokens = torch.randint(0, IMAGE_TOKEN, (3, 10), generator=torch.Generator().manual_seed(1))
    left = torch.ones_like(tokens)
    left[0, :4] = 0
    left[2, :1] = 0
    return [{"input_ids": tokens}, _masked(tokens, left), _masked(tokens, left.flip(1))]


def _tiny_vlm(
    model_type: str, images: Inputs, tower: transformers.PreTrainedConfig, **fields: Any
) -> tuple[nn.Module, list[Inputs]]:
    config = transformers.AutoConfig.for_model(
        model_type,
        text_config=tower,
        vision_config=tiny_vision_config(),
        image_token_index=IMAGE_TOKEN,
        **fields,
    )
    model: Any = random_model(transformers.AutoModelForImageTextToText, config)
    with torch.no_grad():
        lengths = [len(image) for image in model.get_image_features(**images).pooler_output]
    return model, [*_image_batches(lengths, images), *text_batches()]


def _image_batches(lengths: Sequence[int], images: Inputs) -> list[Inputs]:
    """Return batches whose samples hold the first two images, the third one, and none."""
    first, second, third = lengths
    longest = first + second + 5
    unpadded = [_row(longest, first, second), _row(longest, third), _row(longest)]
    ragged = [_row(longest, first, second), _row(third + 3, third), _row(7)]
    batches = (_padded(unpadded, "right"), _padded(ragged, "left"), _padded(ragged, "right"))
    return [batch | images for batch in batches]


def _row(length: int, *images: int) -> Tensor:
    """Return token ids [length]; every image follows on a token of text."""
    tokens = torch.randint(0, IMAGE_TOKEN, (length,), generator=torch.Generator().manual_seed(length))
    at = 1
    for count in images:
        tokens[at : at + count] = IMAGE_TOKEN
        at += count + 1
    return tokens


def _padded(rows: Sequence[Tensor], side: Literal["left", "right"]) -> Inputs:
    longest = max(len(row) for row in rows)
    missing = [(longest - len(row), 0) if side == "left" else (0, longest - len(row)) for row in rows]
    tokens = [functional.pad(row, pad) for row, pad in zip(rows, missing, strict=True)]
    masks = [functional.pad(torch.ones_like(row), pad) for row, pad in zip(rows, missing, strict=True)]
    return _masked(torch.stack(tokens), torch.stack(masks))


def _masked(tokens: Tensor, mask: Tensor) -> Inputs:
    return {"input_ids": tokens, "attention_mask": mask}


def random_model(auto_class: Any, config: transformers.PreTrainedConfig) -> nn.Module:
    """Return a random model of a configuration in eval mode, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = auto_class.from_config(config)
    return model.eval()
