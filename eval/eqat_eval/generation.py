"""Text from a model, with the sampling the caller asked for and nothing the checkpoint adds to it.

A penalty that `generation_config.json` sets would hide the very loops we look for: see `eqat_eval.decoding`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from eqat_eval.decoding import decoding, generated
from eqat_eval.graphed_decode import CudaGraph, decode, uses_graph
from eqat_eval.inference import inference
from eqat_eval.prompts import encode_prompt
from eqat_eval.repetition import Repetition, repetition
from eqat_mm.errors import DataError
from eqat_mm.runtime.progress import progress
from eqat_mm.runtime.seeding import derive_seed

__all__ = [
    "GeneratedText",
    "GenerationJudgement",
    "generate_about_images",
    "generate_text",
    "judge_generation",
    "repetition",
]


@dataclass(frozen=True)
class GeneratedText:
    """A continuation.

    Attributes:
        text: the continuation without the prompt and without special tokens.
        token_ids: its token ids, the closing end-of-text token included.
        seconds: wall time of prompt processing and generation.
    """

    text: str
    token_ids: tuple[int, ...]
    seconds: float

    @property
    def tokens(self) -> int:
        """Number of generated tokens."""
        return len(self.token_ids)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second, prompt processing included."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class GenerationJudgement:
    """Means over prompts; texts too short for an n-gram are left out of that mean.

    Attributes:
        repetition: mean repeated 4-grams and distinct 2-grams; None where no text was long enough.
        tokens: mean number of generated tokens; far below the limit may be a model that gives up.
        tokens_per_second: all tokens over all seconds.
        samples: every text, to be read.
    """

    repetition: Repetition
    tokens: float
    tokens_per_second: float
    samples: tuple[GeneratedText, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready record: the means by name and the texts, without token ids."""
        return {
            "prompts": len(self.samples),
            **asdict(self.repetition),
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "texts": [sample.text for sample in self.samples],
        }


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    system: str | None = None,
    stream: bool = False,
    cuda_graph: CudaGraph = "auto",
) -> GeneratedText:
    """Continue one prompt.

    The global random state is left as it was; the same seed gives the same text on the same machine.

    Args:
        model: a causal LM; runs in eval mode, its training flags are restored.
        tokenizer: its tokenizer.
        prompt: the text to continue, or with `chat` the user's message.
        max_new_tokens: upper bound; generation ends earlier at an end-of-text token.
        temperature: 0 for greedy decoding, above 0 for sampling.
        top_p: sample from the smallest set of tokens with this total probability; 1 for all.
        seed: of the sampling; greedy decoding ignores it.
        chat: wrap the prompt in the tokenizer's chat template.
        system: with `chat`, what the system says first.
        stream: print the text on stdout as it is generated.
        cuda_graph: replay a decode step from a CUDA graph; `auto` on a GPU, where the model can.

    Raises:
        ConfigError: an option out of range, or `chat` without a chat template, or one that refuses the prompt.
        DataError: a prompt without a token.
        CheckpointError: the model's predictions are not finite.
    """
    inputs = encode_prompt(tokenizer, prompt, chat=chat, system=system)
    settings = decoding(model, tokenizer, max_new_tokens, temperature=temperature, top_p=top_p)
    return continued(model, tokenizer, inputs, settings, seed=seed, stream=stream, graph=uses_graph(model, cuda_graph))


def generate_about_images(
    model: PreTrainedModel,
    processor: Any,
    prompt: str,
    images: Sequence[Any],
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    system: str | None = None,
    stream: bool = False,
    cuda_graph: CudaGraph = "auto",
) -> GeneratedText:
    """Answer a user's message about images; otherwise as `generate_text`.

    Args:
        model: a vision-language model.
        processor: its processor, with a chat template.
        prompt: the user's message.
        images: what it is about, in mode RGB; they come where the message has `<image>`, or before it. None: a message
            in words alone.
        max_new_tokens: upper bound; generation ends earlier at an end-of-text token.
        temperature: 0 for greedy decoding, above 0 for sampling.
        top_p: sample from the smallest set of tokens with this total probability; 1 for all.
        seed: of the sampling; greedy decoding ignores it.
        system: what the system says first.
        stream: print the text on stdout as it is generated.
        cuda_graph: replay a decode step from a CUDA graph; `auto` on a GPU, where the model can.

    Raises:
        ConfigError: an option out of range, or no chat template, or one that refuses the prompt.
        DataError: a prompt with more or fewer `<image>` than images.
        CheckpointError: the model's predictions are not finite.
    """
    tokenizer = processor.tokenizer
    inputs = encode_prompt(processor, prompt, images, chat=True, system=system)
    settings = decoding(model, tokenizer, max_new_tokens, temperature=temperature, top_p=top_p)
    return continued(model, tokenizer, inputs, settings, seed=seed, stream=stream, graph=uses_graph(model, cuda_graph))


def continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, Tensor],
    settings: GenerationConfig,
    *,
    seed: int,
    stream: bool,
    graph: bool,
) -> GeneratedText:
    """Continue one prompt that is encoded.

    Args:
        model: runs in eval mode.
        tokenizer: its tokenizer.
        inputs: what its forward takes, batch of one.
        settings: of the decoding.
        seed: of the sampling.
        stream: print the text on stdout as it is generated.
        graph: replay a decode step from a CUDA graph.

    Raises:
        CheckpointError: the model's predictions are not finite.
    """
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    write = _decoded if graph else generated
    started = time.perf_counter()
    with inference(model), _seeded(derive_seed(seed, "generation")):
        tokens_1T = write(model, inputs, settings, streamer)
    new = tuple(tokens_1T[0, inputs["input_ids"].shape[1] :].tolist())
    seconds = time.perf_counter() - started
    return GeneratedText(str(tokenizer.decode(list(new), skip_special_tokens=True)), new, seconds)


def _decoded(model: Any, inputs: dict[str, Tensor], settings: GenerationConfig, streamer: Any) -> Tensor:
    names = ("max_new_tokens", "temperature", "top_p", "eos_token_id", "pad_token_id")
    return decode(model, inputs, **{name: getattr(settings, name) for name in names}, streamer=streamer)


def judge_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
) -> GenerationJudgement:
    """Continue every prompt and average the repetition; arguments as in `generate_text`.

    Each prompt samples with its own seed, derived from `seed` and its place in the list.

    Raises:
        ConfigError, CheckpointError: as in `generate_text`.
        DataError: no prompts, or one without a token.
    """
    if not prompts:
        raise DataError("prompts", "an empty list", "at least one prompt", "pass the prompts to continue")
    samples = tuple(
        generate_text(
            model,
            tokenizer,
            prompt,
            max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=derive_seed(seed, "prompt", index),
            chat=chat,
        )
        for index, prompt in enumerate(progress(prompts, what="generation", total=len(prompts), unit="prompt"))
    )
    return _mean(samples)


def _mean(samples: tuple[GeneratedText, ...]) -> GenerationJudgement:
    scores = [repetition(sample.token_ids) for sample in samples]
    tokens = sum(sample.tokens for sample in samples)
    return GenerationJudgement(
        repetition=Repetition(
            repeated_4grams=_mean_of_known([score.repeated_4grams for score in scores]),
            distinct_2=_mean_of_known([score.distinct_2 for score in scores]),
        ),
        tokens=tokens / len(samples),
        tokens_per_second=tokens / sum(sample.seconds for sample in samples),
        samples=samples,
    )


def _mean_of_known(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators, the only ones `generate` draws from, and restore them afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
