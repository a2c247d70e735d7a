"""The tokenizer of a language model where a vision-language model has a processor: for conversations without images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from eqat_mm.data.image_text.conversations import IMAGE


class NoImages:
    """The image processor of a model that sees none."""

    model_input_names: ClassVar[Sequence[str]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return its settings, as transformers' own do: there are none."""
        return {}

    def to_json_string(self) -> str:
        """Return them as JSON."""
        return "{}"


class TextSpeaker:
    """What `Chat` takes for a processor.

    Args:
        tokenizer: of the language model, with a chat template.

    Attributes:
        image_token: `<image>`, which is text to this model.
        image_token_id: of no token.
        image_processor: of no image.
    """

    image_token = IMAGE
    image_token_id = -1
    image_processor = NoImages()

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @property
    def chat_template(self) -> Any:
        """The template, which is the tokenizer's."""
        return self.tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, template: str) -> None:
        self.tokenizer.chat_template = template
