"""SmolVLM2: as Idefics3."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import transformers

from llava_adapters.idefics3 import ARCH as IDEFICS3
from llava_adapters.idefics3 import SIZE, tiny, tokenizer
from llava_adapters.idefics3 import processor as idefics3
from llava_adapters.tiny_processor import CHAT_TEMPLATE


def processor() -> Any:
    """Return a processor for the tiny model.

    SmolVLM's own cannot be made without the package num2words, which it needs for videos. What it makes of images is
    what that of Idefics3 makes.
    """
    if find_spec("num2words") is None:
        return idefics3()
    images, videos = transformers.SmolVLMImageProcessor(**SIZE), transformers.SmolVLMVideoProcessor(**SIZE)
    return transformers.SmolVLMProcessor(images, tokenizer(), videos, image_seq_len=4, chat_template=CHAT_TEMPLATE)


ARCH = replace(IDEFICS3, name="smolvlm", model_types=("smolvlm",), tiny=lambda: tiny("smolvlm"), processor=processor)
"""The declaration; see docs/adding_a_model.md."""
