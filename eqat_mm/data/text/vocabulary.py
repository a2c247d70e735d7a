"""The tokens that a text can begin with, hold and end with, by model and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eqat_mm.errors import ConfigError

_BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Vocabulary:
    """What a model may write.

    Attributes:
        start: what the tokenizer puts before every text: its beginning-of-text token, mostly, or nothing.
        first: the tokens that a text may begin with, in ascending order.
        allowed: bool [V], the tokens that may follow, those that end a text among them.
        ends: the tokens that end a text, and are no part of it.
    """

    start: tuple[int, ...]
    first: tuple[int, ...]
    allowed: Tensor
    ends: frozenset[int]


def vocabulary_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Return what a model may write.

    A text ends at an end-of-text token, and at any other special one: a chat model has several ends, and often closes
    plain text with that of its base model, which its tokenizer has under another name.

    Left out everywhere: padding, stand-ins for images, and rows of the embedding that no token has (models pad it).
    Left out at the beginning: special tokens, tokens added to the vocabulary, and those that are no text by themselves,
    such as a part of a character.

    Raises:
        ConfigError: no token is left to begin with; the tokenizer is that of another model.
    """
    size = model.config.get_text_config().vocab_size
    added = tokenizer.added_tokens_decoder
    known = {token for token in tokenizer.get_vocab().values() if token < size}
    ends = _ends(model, tokenizer)
    unwritten = {tokenizer.pad_token_id, getattr(model.config, "image_token_id", None)} - ends
    special = {*tokenizer.all_special_ids, *(token for token, text in added.items() if text.special)}
    ends = ((ends | special) & known) - unwritten
    words = sorted(known - special - ends - unwritten)
    candidates = [token for token in words if token not in added]
    texts: list[str] = tokenizer.batch_decode([[token] for token in candidates]) if candidates else []
    first = tuple(token for token, text in zip(candidates, texts, strict=True) if text and _BROKEN not in text)
    if not first:
        raise ConfigError(
            where=f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}",
            given=f"no token of text among the {size} rows of the model's embedding",
            allowed="the tokenizer that the model was trained with",
            do="put that tokenizer's files beside the weights",
        )
    allowed = torch.zeros(size, dtype=torch.bool)
    allowed[[*words, *ends]] = True
    return Vocabulary(start_of(tokenizer), first, allowed, frozenset(ends))


def start_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return what a tokenizer puts before every text: its beginning-of-text token, mostly, or nothing."""
    text = _known_text(tokenizer)
    whole, bare = (list(tokenizer(text, add_special_tokens=adds)["input_ids"]) for adds in (True, False))
    places = [number for number in range(len(whole)) if bare and whole[number : number + len(bare)] == bare]
    if places:
        return tuple(whole[: places[0]])
    return tuple(token for token in whole[:1] if token == tokenizer.bos_token_id)


def _known_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of some token; a tokenizer without an unknown one refuses words it does not have."""
    added = tokenizer.added_tokens_decoder
    texts = (str(tokenizer.decode([token])) for token in range(len(tokenizer)) if token not in added)
    return next((text for text in texts if text.strip()), "")


def decoded(tokenizer: PreTrainedTokenizerBase, token_ids: tuple[int, ...]) -> str:
    """Return tokens as text; a character that the end has cut is left out."""
    text = str(tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))
    return text.rstrip(_BROKEN)


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[Any]:
    """Return the end-of-text tokens of tokenizer and model."""
    config = model.generation_config
    found = [tokenizer.eos_token_id, None if config is None else config.eos_token_id]
    return {token for each in found if each is not None for token in (each if isinstance(each, list) else [each])}
