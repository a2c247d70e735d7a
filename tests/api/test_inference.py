"""A packed model at work: caches, batches, streaming, images; loaded by us and by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import eqat_mm
from eqat_mm.blocks.source import open_model
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.rtn import run_rtn
from llava_adapters import arch_for
from tests.checkpoint.foreign import packed_linears
from tests.tiny_llava import save_tiny_llava
from tests.tiny_model import save_model

GREEDY: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CACHES = ("dynamic", "static")


@pytest.fixture(scope="module", params=["load", "from_pretrained"])
def language(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("language")
    save_model(folder / "full", 2, torch.bfloat16)
    run_rtn(open_model(folder / "full", arch_for("llama")), QuantSpec(3, 32), folder, source="tiny", provenance={})
    return read(request.param, folder / "model", transformers.AutoModelForCausalLM)


@pytest.fixture(scope="module", params=["load", "from_pretrained"])
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Any]]:
    folder = tmp_path_factory.mktemp("seeing")
    batches = save_tiny_llava(folder / "full")
    run_rtn(open_model(folder / "full", arch_for("llava")), QuantSpec(4, 32), folder, source="tiny", provenance={})
    return read(request.param, folder / "model", transformers.AutoModelForImageTextToText), batches


def read(how: str, folder: Path, auto: Any) -> Any:
    model = eqat_mm.load(folder) if how == "load" else auto.from_pretrained(folder, dtype=torch.float32)
    assert packed_linears(model)
    return model


def tokens_of(length: int, seed: int) -> Tensor:
    return torch.randint(2, 90, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cache", CACHES)
def test_every_cache_gives_what_no_cache_gives(language: Any, cache: str) -> None:
    asked = tokens_of(9, 0)
    wanted = language.generate(asked, **GREEDY, use_cache=False)
    assert torch.equal(language.generate(asked, **GREEDY, cache_implementation=cache), wanted)


@pytest.mark.parametrize("cache", CACHES)
def test_a_batch_padded_on_the_left_is_each_row_alone(language: Any, cache: str) -> None:
    rows = [tokens_of(length, length) for length in (4, 9, 6)]
    length = max(row.shape[1] for row in rows)
    padded = torch.cat([torch.nn.functional.pad(row, (length - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (length - row.shape[1], 0)) for row in rows])
    together = language.generate(padded, attention_mask=mask, **GREEDY, cache_implementation=cache)
    for row, answer in zip(rows, together, strict=True):
        alone = language.generate(row, attention_mask=torch.ones_like(row), **GREEDY)
        assert torch.equal(answer[length:], alone[0, row.shape[1] :])


def test_several_beams(language: Any) -> None:
    answers = language.generate(tokens_of(6, 1), **GREEDY, num_beams=3, num_return_sequences=3)
    assert answers.shape == (3, 13)
    assert len({tuple(row.tolist()) for row in answers}) == 3


class Heard(BaseStreamer):
    """Keeps what it is given, token by token."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("cache", CACHES)
def test_streamed_token_by_token(language: Any, cache: str) -> None:
    heard, asked = Heard(), tokens_of(5, 2)
    answer = language.generate(asked, **GREEDY, cache_implementation=cache, streamer=heard)
    assert heard.ended
    assert heard.tokens == answer[0].tolist()


@pytest.mark.parametrize("cache", CACHES)
def test_about_images(seeing: tuple[Any, list[Any]], cache: str) -> None:
    model, batches = seeing
    inputs = next(batch for batch in batches if "pixel_values" in batch)
    wanted = model.generate(**inputs, **GREEDY, use_cache=False)
    assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation=cache), wanted)
    dark = inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}
    assert not torch.equal(model(**dark).logits, model(**inputs).logits)


def test_in_half_precision(language: Any) -> None:
    half = eqat_mm.load(language.checkpoint_origin.folder, dtype=torch.bfloat16)
    asked = tokens_of(9, 3)
    answers = [half.generate(asked, **GREEDY, cache_implementation=cache) for cache in CACHES]
    assert torch.equal(*answers)
