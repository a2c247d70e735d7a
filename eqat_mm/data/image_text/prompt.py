"""A conversation as its model reads it, for training, `generate` and tasks: rendered by the template, then tokenised.

Special tokens stand in the text once, whoever writes them. What the tokenizer puts before every text (a
beginning-of-text token, mostly) comes first, unless the template or the user has written it already. What it puts
behind every text is left out: a prompt goes on, and in training the end of a turn is the template's to write.

`<image>` in what a user says stands for an image. Where the template writes images and text in the order it is given
them, the text around an image stays as it is. Templates such as LLaVA-1.5's write all images first; then the rest of
the turn is one piece of text, without its `<image>`, as in LLaVA's own training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from eqat_mm.data.image_text.columns import REPLACED, is_row, taken_apart
from eqat_mm.data.image_text.conversations import IMAGE, Turn
from eqat_mm.data.image_text.prefix import framed, has_prefix, unframed
from eqat_mm.data.text.vocabulary import start_of
from eqat_mm.errors import ConfigError, DataError
from eqat_mm.runtime.time_limit import time_limit

_BEFORE, _BEHIND = "text before", "text behind"
"""What is asked of a template to find out where it writes images."""

_IMAGE = {"type": "image"}
_PATIENCE = 10.0
"""Seconds that a template may take, a program of the model's whose loops need not end; they take milliseconds."""


class Renderer:
    """Chat template and tokenizer of one model.

    Args:
        speaker: the processor of a vision-language model, or the tokenizer of a language model.

    Attributes:
        tokenizer: the tokenizer.
        image_token: the text of the token that stands for an image.
    """

    def __init__(self, speaker: Any) -> None:
        self._speaker = speaker
        self._sees = isinstance(speaker, ProcessorMixin)
        self._frames = has_prefix(speaker)
        self._reads = unframed(speaker) if self._frames else speaker
        self.tokenizer = speaker.tokenizer if self._sees else speaker
        self.image_token: str = getattr(speaker, "image_token", None) or IMAGE
        self._start = start_of(self.tokenizer)
        self._patience = _PATIENCE

    def asked(self, text: str, images: int) -> Turn:
        """Return a user's message about images; a message that does not place them itself has them in front.

        Raises:
            DataError: it places more images, or fewer, than there are, or is not Unicode.
        """
        require_unicode(text)
        placed = len(self._marks.findall(text))
        if placed in (0, images):
            return Turn("user", text if placed else IMAGE * images + text)
        raise DataError(
            "prompt",
            f"{placed} {IMAGE} in the text for {images} images",
            f"one {IMAGE} for each image, or none: the images then come before the text",
            f"give as many images as the text has {IMAGE}, or take {IMAGE} out of it",
        )

    def text(self, turns: Sequence[Turn], *, answering: bool = False) -> str:
        """Return a conversation as its model's text, one image token for each image.

        Args:
            turns: what is said.
            answering: go on to where the assistant's next turn begins.

        Raises:
            ConfigError: there is no chat template, or it refuses the conversation.
        """
        text = self._applied([self._message(turn) for turn in turns], answering)
        return framed(self._speaker, text, answering=answering) if self._frames else text

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts; an image token stays one token.

        Raises:
            DataError: a text is not Unicode, or the tokenizer has no token for a part of it.
        """
        if not texts:
            return []
        require_unicode(*texts)
        try:
            found = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        except Exception as error:  # tokenizers has no class for what it cannot tokenise
            said = " ".join(str(error).split())[:200]
            raise DataError("prompt", said, "text that the tokenizer knows", "take other words") from error
        return [[*self.missing_start(text), *row] for text, row in zip(texts, found["input_ids"], strict=True)]

    def inputs(self, text: str, images: Sequence[Any] = (), **options: bool) -> dict[str, Any]:
        """Return what the model's forward takes, of one text: all that the processor makes of it.

        Args:
            text: with one image token for each image.
            images: in mode RGB.
            options: more that the processor is to return (`return_offsets_mapping`, ...).

        Returns:
            Rows of tokens, first axis T (`input_ids`, `attention_mask`, ...), and what belongs to images; see
            `columns`.

        Raises:
            DataError: the text is not Unicode, or has more or fewer image tokens than there are images.
            ConfigError: the processor returns what is no tensor.
        """
        if not self._sees:
            ids = torch.tensor(self.ids([text])[0], dtype=torch.int64)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        require_unicode(text)
        found = self._processed(text, images, add_special_tokens=False, **options)
        parts = taken_apart(found, type(self._speaker).__name__)
        tokens, start = len(parts["input_ids"]), torch.tensor(self.missing_start(text), dtype=torch.int64)
        if not len(start):
            return parts
        return {
            name: _behind(start, name, value) if name != REPLACED and is_row(name, value, tokens) else value
            for name, value in parts.items()
        }

    def _processed(self, text: str, images: Sequence[Any], **settings: Any) -> Any:
        """Return what the processor makes: tensors of images, lists of tokens, which it is slow to make tensors of."""
        tensors = {"images_kwargs": {"return_tensors": "pt"}}
        try:
            return self._reads(text=[text], images=list(images) or None, **tensors, **settings)
        except ValueError as error:
            said = " ".join(str(error).split())[:200]
            raise DataError(
                "prompt",
                f"{text.count(self.image_token)} {self.image_token} in {text!r:.80}: {said}",
                f"one token {self.image_token} for each of {len(images)} images",
                "mend chat_template.jinja or the tokenizer beside the weights: one of them loses images or adds some",
            ) from error

    def missing_start(self, text: str) -> tuple[int, ...]:
        """Return what the tokenizer puts before a text, unless it is there already."""
        said = text.replace(self.image_token, "") if self._frames else text
        written = bool(self._start_text) and said.lstrip().startswith(self._start_text)
        return () if written else self._start

    @cached_property
    def _start_text(self) -> str:
        return str(self.tokenizer.decode(list(self._start), clean_up_tokenization_spaces=False))

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        """What stands for an image in a user's text; nothing does for a language model."""
        return re.compile("|".join(map(re.escape, {IMAGE, self.image_token})) if self._sees else "(?!)")

    @cached_property
    def _moves_images(self) -> bool:
        """Whether the template writes images elsewhere than among the text around them."""
        probe = [_text(_BEFORE), _IMAGE, _text(_BEHIND)]
        try:
            said = self._applied([{"role": "user", "content": probe}], answering=True)
        except ConfigError:
            return False
        before, behind = said.find(_BEFORE), said.find(_BEHIND)
        return not before < said.find(self.image_token, max(before, 0)) < behind

    def _message(self, turn: Turn) -> dict[str, Any]:
        """Return a turn as templates take it: pieces of text and images for a processor, text for a tokenizer."""
        if not self._sees:
            return {"role": turn.role, "content": turn.text}
        pieces = self._marks.split(turn.text) if turn.role == "user" else [turn.text]
        if len(pieces) == 1:
            return {"role": turn.role, "content": [_text(turn.text)]}
        pieces = _pieces(pieces)
        if self._moves_images:
            content = [_IMAGE] * (len(pieces) - 1) + [_text("".join(pieces))]
        else:
            content = [part for piece in pieces for part in (_IMAGE, _text(piece))][1:]
        return {"role": turn.role, "content": [part for part in content if part.get("text") != ""]}

    def _applied(self, messages: list[dict[str, Any]], answering: bool) -> str:
        if not self._speaker.chat_template:
            raise ConfigError(
                "chat",
                f"no chat template beside {type(self._speaker).__name__} {self.tokenizer.name_or_path}".rstrip(),
                "a model with a chat template",
                "put chat_template.jinja beside the weights; a language model can go on without: leave out --chat",
            )
        try:
            with time_limit(self._patience):
                text = str(self._speaker.apply_chat_template(messages, add_generation_prompt=answering, tokenize=False))
            text.encode()
        except Exception as error:  # a template is a program of the model's, and anything may go wrong in it
            if isinstance(error, TimeoutError):
                self._patience = 0.0  # nor would it end the next time
            raise ConfigError(
                "chat template",
                f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
                "a chat template that renders this conversation",
                "mend chat_template.jinja beside the weights, or take that of the published model",
            ) from error
        return text


def _behind(start: Tensor, name: str, row: Tensor) -> Tensor:
    """Return a row of tokens with what is missing in front of it: ids, ones in the mask, zeros in any other."""
    if name != "input_ids":
        start = torch.full((len(start), *row.shape[1:]), int(name == "attention_mask"))
    return torch.cat([start.to(row.dtype), row])


def _pieces(pieces: list[str]) -> list[str]:
    """Return the texts around images; between an image at an end of the turn and the text white space is dropped.

    There LLaVA's format has a line break, which templates write themselves.
    """
    words = [position for position, piece in enumerate(pieces) if piece.strip()] or [len(pieces)]
    first, last = words[0], words[-1]
    kept = [piece if first <= position <= last else "" for position, piece in enumerate(pieces)]
    if 0 < first < len(pieces):
        kept[first] = kept[first].lstrip()
    if last < len(pieces) - 1:
        kept[last] = kept[last].rstrip()
    return kept


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def require_unicode(*texts: str) -> None:
    """Check that texts can be tokenised: half of a surrogate pair is no character.

    Raises:
        DataError: one cannot.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            given = f"a character that is not Unicode, at {error.start} in {text!r:.60}"
            raise DataError("prompt", given, "text that can be written in UTF-8", "type it in UTF-8") from error
