"""How tokens are chosen: what the caller asked for, and of the checkpoint its end tokens.

`generation_config.json` of published models sets penalties, stop strings, forbidden words, a cache and more, and
transformers takes from it whatever a call leaves open: no list of what is switched off would stay complete. Here a call
has settings of its own, and while it runs the model has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from eqat_eval.finite import RequireFinite
from eqat_eval.windows import check_positive
from eqat_mm.blocks.attention import new_cache
from eqat_mm.errors import ConfigError


def decoding(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_beams: int = 1,
) -> GenerationConfig:
    """Return settings of a generation; what they do not name is transformers' own default.

    Args:
        model: gives its end tokens (a chat model has several); the tokenizer's where it has none.
        tokenizer: of the model.
        max_new_tokens: most tokens to write.
        temperature: 0 is greedy.
        top_p: nucleus of the sampling.
        num_beams: of a beam search; 1 is none.

    Raises:
        ConfigError: a value outside its range.
    """
    check_positive("max_new_tokens", max_new_tokens)
    check_positive("num_beams", num_beams)
    if not (0.0 <= temperature < float("inf") and 0.0 < top_p <= 1.0):
        raise ConfigError(
            where="sampling",
            given=f"temperature={temperature}, top_p={top_p}",
            allowed="temperature >= 0 (0 is greedy) and 0 < top_p <= 1",
            do="correct the option that is out of range",
        )
    ends = _end_tokens(model, tokenizer)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        eos_token_id=ends or None,
        pad_token_id=_padding(model, tokenizer, ends),
        **sampling,
    )


def generated(
    model: Any, inputs: Mapping[str, Any], settings: GenerationConfig, streamer: BaseStreamer | None = None
) -> Tensor:
    """Return prompts and answers [B, P + new tokens] by transformers' `generate`; call in inference mode.

    Args:
        model: that answers.
        inputs: what its `generate` takes; with a cache (`past_key_values`), the tokens that are in it, too.
        settings: of `decoding`.
        streamer: is given the tokens as they come.

    Raises:
        CheckpointError: the model's predictions are not finite.
    """
    more: dict[str, Any] = {"logits_processor": LogitsProcessorList([RequireFinite(model)])}
    if settings.num_beams == 1 and "past_key_values" not in inputs:
        more["past_key_values"] = new_cache(model)
    with _unconfigured(model):
        tokens: Tensor = model.generate(**inputs, **more, generation_config=settings, streamer=streamer)
    return tokens


@contextmanager
def _unconfigured(model: Any) -> Iterator[None]:
    """Take the checkpoint's settings away: `generate` fills in from them what its own settings leave open."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    for each in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        tokens = [token for token in (each if isinstance(each, list) else [each]) if type(token) is int]
        if tokens:
            return tokens
    return []


def _padding(model: Any, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> int:
    """Return what follows the end of a text while others go on: any token that the embedding has a row for."""
    rows: int = model.config.get_text_config().vocab_size
    return next(token for token in (tokenizer.pad_token_id, *ends, 0) if isinstance(token, int) and 0 <= token < rows)
