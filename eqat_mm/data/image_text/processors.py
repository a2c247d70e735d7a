"""Processor and model, which lie in different files, agree before anything expensive is done.

Folders from before transformers 4.46 leave to the model's configuration what today's processors want to be told: patch
size, which features are kept, how many tokens are no patches. They are taken from there. Whether an image then has as
many tokens in the text as the model makes features of it is tried: one image, and a model of shapes without weights,
where its code can do with shapes alone.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers

from eqat_mm.errors import ConfigError

_SIDES = (40, 90)
"""Width and height of the image that is tried, in pixels: no square, so that missing crops are seen."""

_SETTINGS = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")


def fit_processor(processor: Any, config: transformers.PreTrainedConfig) -> None:
    """Give a processor what only the model's configuration says, and check that the two agree.

    Args:
        processor: of a vision-language model; changed.
        config: of the model.

    Raises:
        ConfigError: they contradict each other, or the tokenizer has no image token.
    """
    if not all(getattr(processor, part, None) for part in ("tokenizer", "image_processor", "image_token")):
        return
    _require_image_token(processor, config)
    set_padding(processor.tokenizer, config)
    if all(hasattr(processor, name) for name in _SETTINGS):
        _take_settings(processor, config)
        _require_features(processor, config)
    else:
        tokens, features = _tried(processor, config)
        if not tokens or features not in (tokens, None):
            raise _contradiction(_said(tokens), f"{features or 'some'}, the model's features of it")


def _require_image_token(processor: Any, config: Any) -> None:
    token, tokenizer, expected = processor.image_token, processor.tokenizer, _image_token(config)
    found = list(tokenizer(token, add_special_tokens=False)["input_ids"])
    if len(found) != 1 or found[0] == tokenizer.unk_token_id:
        raise _contradiction(f"no token {token} in the tokenizer", f"one token {token}, which stands for an image")
    rows = config.get_text_config().vocab_size
    if found[0] >= rows or expected not in (None, *found, *tokens_of_images(processor)):
        raise _contradiction(
            f"{token} is token {found[0]} of the tokenizer",
            f"image_token_id of config.json ({expected}), among the {rows:,} rows of the embedding",
        )


def _image_token(config: Any) -> int | None:
    """Return the token in whose place a model puts features; some call it by an older name."""
    names = ("image_token_id", "image_token_index")
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)


def tokens_of_images(processor: Any) -> list[int]:
    """Return the tokens that a processor writes for images: the one it repeats, and what some put around it."""
    known = {processor.image_token_id, *getattr(processor, "image_token_ids", ())}
    return sorted(token for token in known if isinstance(token, int))


def set_padding(tokenizer: Any, config: Any) -> None:
    """Pad with the end of text where there is no padding token, or none that the embedding has a row for.

    It is masked and not predicted, but it is looked up.
    """
    padding = tokenizer.pad_token_id
    if padding is None or padding >= config.get_text_config().vocab_size:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token


def _take_settings(processor: Any, config: Any) -> None:
    said: dict[str, Any] = {
        "patch_size": getattr(config.vision_config, "patch_size", None),
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
    }
    for name, value in said.items():
        own = getattr(processor, name)
        if own is None:
            setattr(processor, name, value)
        elif value not in (None, own):
            raise _contradiction(f"{name} {own!r}", f"{value!r}, as in config.json")
    processor.num_additional_image_tokens = processor.num_additional_image_tokens or 0
    own, value = (getattr(each, "image_grid_pinpoints", None) for each in (processor.image_processor, config))
    if own is not None and value is not None and [list(grid) for grid in own] != [list(grid) for grid in value]:
        raise _contradiction(f"image_grid_pinpoints {own}", f"{value}, as in config.json")


def _require_features(processor: Any, config: Any) -> None:
    tokens, features = _tried(processor, config)
    assert features is not None
    if tokens < features and not processor.num_additional_image_tokens:  # 0 is also what a missing entry is read as
        processor.num_additional_image_tokens = features - tokens
        tokens, _ = _tried(processor, config)
    counted = processor._get_num_multimodal_tokens(image_sizes=[_SIDES[::-1]])["num_image_tokens"][0]
    if not tokens == counted == features:
        said = _said(tokens) if tokens == counted else f"{tokens} tokens, or {counted} by its crop_size, {_FOR}"
        raise _contradiction(said, f"{features}, the model's features of it")


_FOR = f"for an image of {_SIDES[0]} x {_SIDES[1]} pixels"


def _said(tokens: int) -> str:
    return f"{tokens} tokens {_FOR}"


def _tried(processor: Any, config: Any) -> tuple[int, int | None]:
    """Return how many tokens stand for an image in the text, and how many features the model makes of it.

    The latter is None where that is not seen without weights.
    """
    from PIL import Image

    try:
        image, tensors = Image.new("RGB", _SIDES), {"return_tensors": "pt"}
        found = processor(text=[processor.image_token], images=[image], images_kwargs=tensors)
    except Exception as error:  # whatever the files make of it
        said = " ".join(str(error).split())[:200]
        raise _contradiction(f"an image cannot be read: {said}", "the processor of this model") from error
    token = _image_token(config)
    tokens = list(found["input_ids"][0]).count(processor.image_token_id if token is None else token)
    return tokens, _features(processor, config, found)


def _features(processor: Any, config: Any, found: Any) -> int | None:
    images = {name: found[name] for name in processor.image_processor.model_input_names if name in found}
    images["pixel_values"] = images["pixel_values"].to("meta")
    try:
        made = _without_weights(config).get_image_features(**images).pooler_output
        return int(sum(each.shape[:-1].numel() for each in made))
    except Exception as error:
        if all(hasattr(processor, name) for name in _SETTINGS):  # LLaVA's: shapes are all that its code looks at
            said = " ".join(str(error).split())[:200]
            raise _contradiction(f"an image cannot be read: {said}", "the processor of this model") from error
        return None


def _without_weights(config: Any) -> Any:
    """Return the model on the meta device, with one block of its language tower."""
    config = copy.deepcopy(config)
    config.get_text_config().num_hidden_layers = 1
    with torch.device("meta"):
        return transformers.AutoModelForImageTextToText.from_config(config)


def _contradiction(given: str, allowed: str) -> ConfigError:
    return ConfigError(
        "processor and model",
        given,
        allowed,
        "put processor_config.json, preprocessor_config.json and the tokenizer of this model beside its weights",
    )
