"""From a conversation to token ids and labels, by the model's own processor and chat template.

Labels are the tokens the model has to write itself: behind each of its turns' prompts, through the answer, and the end
of the turn. The template is not asked which tokens these are. Many have no marks for it, and LLaVA-1.5's marks take in
the space behind an answer, which the tokenizer joins with the next speaker's name. Instead the template renders the
conversation up to each answer, as it does for generation. Where that prompt is the beginning of the whole text, labels
begin behind it. Some templates write something else before an answer that was given than before one that is to come
(LLaVA-OneVision's a space more); there labels begin with the answer, whose place is found by rendering the conversation
with other words in place of the answers. The answer itself must be there word for word, white space at its ends apart.
The tokens' offsets give the rest.

The end of a turn is the special token that follows the answer, as in most templates. Where none does (LLaVA-1.5's), the
end-of-sequence token is the *label* of the token behind the answer: the model learns to stop, and what it reads is what
its template renders. Behind the last answer, the end-of-sequence token is there itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from eqat_mm.data.image_text.columns import OFFSETS, REPLACED
from eqat_mm.data.image_text.conversations import IMAGE, Conversation, Turn
from eqat_mm.data.image_text.image_tokens import ImageTokens, Size, places_of
from eqat_mm.data.image_text.prefix import answered, has_prefix
from eqat_mm.data.image_text.problems import BadSample
from eqat_mm.data.image_text.processors import tokens_of_images
from eqat_mm.data.image_text.prompt import Renderer
from eqat_mm.data.image_text.text_speaker import TextSpeaker
from eqat_mm.errors import ConfigError

_STAND_IN = "\uf8f5"
"""For `<image>` where it is text, while the template works on it."""

_ANSWER = "\uf8f6{}\uf8f7"
"""For the answers, while their places are looked for."""

IGNORED = -100
"""Label of a token that is not predicted."""


class Chat:
    """What a processor does with conversations.

    Args:
        processor: a transformers processor with a tokenizer, an image processor and a chat template, or a
            `TextSpeaker`.

    Attributes:
        of_images: the tokens that stand for images, or parts of them, int64 [n].

    Raises:
        ConfigError: one of these is missing, or the tokenizer has no character offsets or no end-of-sequence token.
    """

    def __init__(self, processor: Any) -> None:
        _require_processor(processor)
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self._sees = not isinstance(processor, TextSpeaker)
        self._has_prefix = has_prefix(processor)
        self._renderer = Renderer(processor if self._sees else self.tokenizer)
        self._ends = _turn_ends(processor)
        self._image_tokens = ImageTokens(processor, self._renderer)
        self.of_images = torch.tensor(tokens_of_images(processor))

    def text(self, conversation: Conversation) -> str:
        """Return a conversation as its model's text, with one image token per image.

        Raises:
            BadSample: the template refuses it, or loses an image; or there are images, and the model sees none.
        """
        if conversation.images and not self._sees:
            raise BadSample(f"{len(conversation.images)} images, and this model sees none")
        text = self._rendered(conversation)
        spoken = text.rstrip()
        if spoken.endswith(conversation.turns[-1].text.strip()):
            text = spoken + self.tokenizer.eos_token
        found = text.count(self.processor.image_token)
        if found != len(conversation.images) and not is_written(conversation):
            raise BadSample(f"{found} image tokens in the rendered text for {len(conversation.images)} images")
        return text

    def answers(self, conversation: Conversation, text: str) -> list[tuple[int, int]]:
        """Find the answers in a conversation's text: for each where the model begins to write and where it ends.

        Of a model that reads its prompt whole it is the last one: those before are in that prompt.

        Raises:
            BadSample: the template does not write each answer as it is.
        """
        found = []
        starts: list[int | None] = []
        first = len(conversation.turns) - 1 if self._has_prefix else 0
        for place, (role, said) in enumerate(conversation.turns):
            if role == "assistant" and place >= first:
                answer = said.strip()
                prompt = self._rendered(replace(conversation, turns=conversation.turns[:place]), answering=True)
                begin = len(prompt) if text.startswith(prompt) else None
                start = None if begin is None else _skipping_space(text, begin)
                if start is None or not text.startswith(answer, start):
                    starts = starts or self._starts(conversation, text)
                    start = starts[place]
                if start is None:
                    raise BadSample(f"the chat template does not write the answer {answer!r:.60} as it is")
                found.append((start if begin is None else min(begin, start), start + len(answer)))
        return found

    def _starts(self, conversation: Conversation, text: str) -> list[int | None]:
        """Return where each turn of the assistant begins in a text, None where it is not there word for word."""
        turns = [
            turn if turn.role != "assistant" else Turn(turn.role, _ANSWER.format(place))
            for place, turn in enumerate(conversation.turns)
        ]
        rest, at = self._rendered(replace(conversation, turns=tuple(turns))), 0
        starts: list[int | None] = [None] * len(turns)
        for place, (role, said) in enumerate(conversation.turns):
            if role == "assistant":
                before, there, rest = rest.partition(_ANSWER.format(place))
                at = _skipping_space(text, at)
                start = _skipping_space(text, at + len(before.strip()))
                if not there or not text.startswith(before.strip(), at) or not text.startswith(said.strip(), start):
                    break
                starts[place] = start
                at = start + len(said.strip())
        return starts

    def shown(self, text: str, sizes: Sequence[Size]) -> tuple[str, int]:
        """Return a text with what the processor writes for its images, and the tokens that this leaves out.

        Args:
            text: with one image token for each image, or the beginning of such a text.
            sizes: of all images.

        Raises:
            ConfigError: the processor does not say what it writes.
        """
        if not sizes:
            return text, 0
        token, images = self.processor.image_token, self._image_tokens.of(sizes)
        before, *behind = text.split(token)
        more = sum(image.more for image, _ in zip(images, behind, strict=False))
        if all(image.text == token for image in images):
            return text, more
        return before + "".join(image.text + part for image, part in zip(images, behind, strict=False)), more

    def lengths(self, texts: Sequence[str], sizes: Sequence[Sequence[Size]]) -> list[int]:
        """Return the number of tokens of each text.

        Args:
            texts: with one image token per image.
            sizes: of the images of each text.
        """
        shown = [self.shown(text, each) for text, each in zip(texts, sizes, strict=True)]
        ids = self._renderer.ids([text for text, _ in shown])
        counts = [len(row) + more for row, (_, more) in zip(ids, shown, strict=True)]
        for at, text in enumerate(texts):
            if not sizes[at] and self.processor.image_token in text:
                counts[at] = len(self._as_text(text)[0])
        return counts

    def encode(self, conversation: Conversation, images: list[Any]) -> dict[str, Tensor]:
        """Encode a conversation with its images.

        Args:
            conversation: what is said.
            images: its images, in mode RGB.

        Returns:
            `labels`, int64 [T], and all that the processor gives the model: rows of tokens [T, ...] (`input_ids`,
            `attention_mask`, with some models kinds of tokens), and what belongs to the images; see `columns`.

        Raises:
            BadSample: as for `text` and `answers`.
        """
        sample = self._encoded(conversation, images)
        if not self._has_prefix:
            return sample
        return answered(sample, int((sample["labels"] != IGNORED).nonzero()[0]))

    def _encoded(self, conversation: Conversation, images: list[Any]) -> dict[str, Tensor]:
        text = self.text(conversation)
        if is_written(conversation) or not self._sees:
            ids, offsets = self._as_text(text)
            return {"input_ids": ids, "labels": self._labels(ids, offsets, self.answers(conversation, text))}
        inputs = self._renderer.inputs(text, images, return_offsets_mapping=True, return_text_replacement_offsets=True)
        expanded = places_of(inputs, self.processor) if images else []
        _require_own_words(self.processor, inputs[OFFSETS], _moved(len(text), expanded))
        answers = [(_moved(start, expanded), _moved(end, expanded)) for start, end in self.answers(conversation, text)]
        labels = self._labels(inputs["input_ids"], inputs[OFFSETS], answers)
        return {name: value for name, value in inputs.items() if name not in (OFFSETS, REPLACED)} | {"labels": labels}

    def _as_text(self, text: str) -> tuple[Tensor, Tensor]:
        """Return ids, int64 [T], and offsets, int64 [T, 2], of a text in which the image token is words of a user's.

        Raises:
            BadSample: this tokenizer has no other tokens for them.
        """
        start = self._renderer.missing_start(text)
        found = self._without_image_token.encode(text, add_special_tokens=False)
        if self.processor.image_token_id in found.ids:
            raise BadSample(f"{IMAGE} without an image, which this tokenizer cannot read as text")
        return torch.tensor([*start, *found.ids]), torch.tensor([(0, 0)] * len(start) + found.offsets)

    @cached_property
    def _without_image_token(self) -> Tokenizer:
        stored = json.loads(self.tokenizer.backend_tokenizer.to_str())
        added = [token for token in stored["added_tokens"] if token["content"] != self.processor.image_token]
        return Tokenizer.from_str(json.dumps(stored | {"added_tokens": added, "truncation": None, "padding": None}))

    def _rendered(self, conversation: Conversation, *, answering: bool = False) -> str:
        turns, is_text = conversation.turns, is_written(conversation)
        if is_text:
            turns = tuple(Turn(role, text.replace(IMAGE, _STAND_IN)) for role, text in turns)
        try:
            text = self._renderer.text(turns, answering=answering)
            return text.replace(_STAND_IN, IMAGE) if is_text else text
        except ConfigError as error:
            raise BadSample(f"the chat template refuses it: {error.given}") from error

    def _labels(self, ids: Tensor, offsets: Tensor, answers: list[tuple[int, int]]) -> Tensor:
        """Return the ids of answers and ends of turns, and -100 elsewhere.

        Args:
            ids: int64 [T].
            offsets: int64 [T, 2], first and last character (exclusive) of each token.
            answers: (first, last) character of each answer.
        """
        labels = torch.full_like(ids, IGNORED)
        for start, end in answers:
            inside = ((offsets[:, 0] < end) & (offsets[:, 1] > start)).nonzero()
            first, behind = int(inside[0]), int(inside[-1]) + 1
            stop = self._end_of_turn(ids, behind)
            labels[first:stop] = ids[first:stop]
            if stop == behind:
                labels[behind] = self.tokenizer.eos_token_id
        return labels

    def _end_of_turn(self, ids: Tensor, behind: int) -> int:
        """Return the position after the special token that ends the turn, or `behind` where there is none."""
        for position in range(behind, len(ids)):
            token = int(ids[position])
            if token in self._ends:
                return position + 1
            if self.tokenizer.decode([token]).strip():
                break
        return behind


def is_written(conversation: Conversation) -> bool:
    """Whether `<image>` is text in a conversation: it has no images."""
    return not conversation.images and any(IMAGE in turn.text for turn in conversation.turns)


def _skipping_space(text: str, at: int) -> int:
    """Return the first place from `at` on that is no white space."""
    return len(text) - len(text[at:].lstrip())


def _turn_ends(processor: Any) -> set[int]:
    """Return the special tokens that can end a turn: those that stand for no image, no word and no beginning."""
    tokenizer = processor.tokenizer
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    others = {*tokens_of_images(processor), tokenizer.unk_token_id, tokenizer.bos_token_id} - {tokenizer.eos_token_id}
    return (special | set(tokenizer.all_special_ids)) - others


def _require_own_words(processor: Any, offsets: Tensor, length: int) -> None:
    """Check that a text has grown by what stands for images alone; answers are looked for where they were in it.

    Raises:
        ConfigError: it is longer.
    """
    if len(offsets) and int(offsets[:, 1].max()) > length:
        raise ConfigError(
            f"processor {type(processor).__name__}",
            "words of its own that it writes into the text of a conversation",
            "a processor that replaces image tokens, and leaves all else to the chat template",
            "train this model on text (--text_only); what a conversation's answers are cannot be told in its tokens",
        )


def _moved(character: int, expanded: list[dict[str, Any]]) -> int:
    """Return where a character of the rendered text is, once each image token has become many."""
    gains = [place["new_span"][1] - place["span"][1] for place in expanded if place["span"][1] <= character]
    return character + (gains[-1] if gains else 0)


def _require_processor(processor: Any) -> None:
    name = type(processor).__name__
    missing = [part for part in ("tokenizer", "image_processor", "chat_template") if not getattr(processor, part, None)]
    if not missing and not processor.tokenizer.is_fast:
        missing = ["fast tokenizer (with character offsets)"]
    if not missing and processor.tokenizer.eos_token is None:
        missing = ["end-of-sequence token"]
    if missing and isinstance(processor, TextSpeaker):
        raise ConfigError(
            f"tokenizer {processor.tokenizer.name_or_path}".rstrip(),
            f"no {', no '.join(missing)}",
            "a language model that holds conversations, with its chat template",
            "name one with --conversations.template, or put chat_template.jinja beside the weights",
        )
    if missing:
        raise ConfigError(
            f"processor {name}",
            f"no {', no '.join(missing)}",
            "the processor of a vision-language model, with its chat template",
            "put processor_config.json, preprocessor_config.json, chat_template.jinja and the tokenizer's files "
            "beside the weights",
        )
