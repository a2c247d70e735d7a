"""Generated tokens: the paper's mix, and texts that do not depend on what is written beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import AddedToken
from torch import Tensor, nn

from eqat_mm.data.generated import sampling as module
from eqat_mm.data.generated.sampling import GeneratedTokens, Sampling, generate_tokens
from eqat_mm.data.text.vocabulary import Vocabulary, decoded, vocabulary_of
from eqat_mm.errors import CheckpointError, ConfigError
from llava_adapters.tiny import tiny_causal_lm
from tests.checkpoint.files import assert_four_lines
from tests.tiny_model import WORDS, tiny_llama, word_tokenizer

LENGTH = 24
END = WORDS.index("</s>")
UNKNOWN = WORDS.index("<unk>")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(eos_token_id=END)


@pytest.fixture(scope="module")
def vocabulary(model: Any) -> Vocabulary:
    return vocabulary_of(model, word_tokenizer())


def written(
    model: Any, vocabulary: Vocabulary, indices: Sequence[int] = range(10), **settings: Any
) -> dict[int, GeneratedTokens]:
    texts = generate_tokens(model, vocabulary, indices, **({"length": LENGTH, "seed": 0} | settings))
    return {text.index: text for text in texts if text is not None}


# ---- what is written --------------------------------------------------------------------------------


def by_transformers(model: Any, first: int, tokens: int) -> list[int]:
    ids = torch.tensor([[first]])
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=[END, UNKNOWN],
    )
    ids_T: list[int] = found[0].tolist()
    return ids_T


def without_ends(token_ids: list[int]) -> list[int]:
    return [token for token in token_ids if token not in (END, UNKNOWN)]


def test_greedy_texts_are_those_of_transformers(model: Any, vocabulary: Vocabulary) -> None:
    for text in written(model, vocabulary, sampling="greedy", batch_size=4).values():
        expected = by_transformers(model, text.token_ids[0], LENGTH - 1)
        assert list(text.token_ids) == without_ends(expected)
        assert text.ended is (expected[-1] in (END, UNKNOWN))


def test_three_to_five_tokens_behind_the_first_are_greedy(model: Any, vocabulary: Vocabulary) -> None:
    texts = written(model, vocabulary, range(60), length=12, batch_size=60)
    greedy = []
    for text in texts.values():
        expected = without_ends(by_transformers(model, text.token_ids[0], 11))
        pairs = zip(text.token_ids[1:], expected[1:], strict=False)
        equal = next((position for position, (a, b) in enumerate(pairs) if a != b), None)
        if equal is not None:
            greedy.append(equal)
    assert len(greedy) > 40
    assert min(greedy) == 3  # a sampled token may happen to be the most likely one, so some seem to have more
    assert {3, 4, 5} <= set(greedy)
    assert sum(count <= 5 for count in greedy) > 0.9 * len(greedy)


def test_later_tokens_follow_the_softmax(model: Any, vocabulary: Vocabulary) -> None:
    (first, *_) = vocabulary.first
    vocabulary = replace(vocabulary, allowed=vocabulary.allowed.clone())
    vocabulary.allowed[[UNKNOWN, 50]] = False
    count = 4000
    texts = written(
        model, replace(vocabulary, first=(first,)), range(count), length=2, sampling="random", batch_size=1000
    )
    with torch.no_grad():
        logits = model(torch.tensor([[first]])).logits[0, -1].double()
    logits[~vocabulary.allowed] = float("-inf")
    expected = logits.softmax(-1)
    tokens = torch.tensor([END if text.ended else text.token_ids[1] for text in texts.values()])
    found = torch.bincount(tokens, minlength=len(expected)) / count
    deviation = (expected * (1 - expected) / count).sqrt()
    assert bool(((found - expected).abs() <= 4.5 * deviation + 1e-12).all())


def test_the_first_token_is_uniform_over_text(model: Any, vocabulary: Vocabulary) -> None:
    assert vocabulary.first == tuple(range(2, len(WORDS)))
    texts = written(model, vocabulary, range(2000), length=2, batch_size=500)
    found = torch.bincount(torch.tensor([text.token_ids[0] for text in texts.values()]), minlength=len(WORDS))
    assert found[[UNKNOWN, END]].tolist() == [0, 0]
    assert 4 < int(found[2:].min()) <= int(found[2:].max()) < 45  # 21 expected


def test_texts_end_or_have_the_full_length(model: Any, vocabulary: Vocabulary) -> None:
    texts = written(model, vocabulary, range(40))
    assert {text.ended for text in texts.values()} == {True, False}
    for text in texts.values():
        assert len(text.token_ids) == LENGTH or text.ended
        assert not {END, UNKNOWN} & set(text.token_ids)


# ---- on what it depends -----------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["paper", "random", "greedy"])
def test_texts_do_not_depend_on_the_batch(model: Any, vocabulary: Vocabulary, sampling: Sampling) -> None:
    alone, three, eight = (
        written(model, vocabulary, range(20), sampling=sampling, batch_size=size) for size in (1, 3, 8)
    )
    assert alone == three == eight
    assert alone.keys() == set(range(20))


def test_texts_do_not_depend_on_each_other(model: Any, vocabulary: Vocabulary) -> None:
    whole = written(model, vocabulary, range(12))
    some = written(model, vocabulary, [7, 2, 11], batch_size=2)
    assert some == {index: whole[index] for index in (2, 7, 11)}


def test_seed_and_index_make_the_text(model: Any, vocabulary: Vocabulary) -> None:
    texts = written(model, vocabulary)
    assert len({text.token_ids for text in texts.values()}) == len(texts)
    assert all(text != texts[index] for index, text in written(model, vocabulary, seed=1).items())


def test_a_cache_that_is_moved_and_grown_changes_nothing(
    model: Any, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = written(model, vocabulary, range(20))
    monkeypatch.setattr(module, "_CHUNK", 5)
    assert written(model, vocabulary, range(20), batch_size=3) == expected


def test_a_token_before_every_text(model: Any, vocabulary: Vocabulary) -> None:
    with_start = replace(vocabulary, start=(5,))
    texts = written(model, with_start, batch_size=3, sampling="greedy")
    assert texts == written(model, with_start, batch_size=8, sampling="greedy")
    ids = torch.tensor([[5, texts[0].token_ids[0]]])
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    logits[~vocabulary.allowed] = float("-inf")
    assert int(logits.argmax()) == texts[0].token_ids[1]
    assert max(len(text.token_ids) for text in texts.values()) == LENGTH


def test_a_sliding_window(vocabulary: Vocabulary) -> None:
    model, _ = tiny_causal_lm("mistral", sliding_window=6, initializer_range=0.2)
    texts = written(model, vocabulary, batch_size=3, sampling="greedy")
    assert texts == written(model, vocabulary, batch_size=1, sampling="greedy")
    ids = torch.tensor([texts[0].token_ids[:-1]])
    with torch.no_grad():
        logits = model(ids).logits[0]
    logits[:, ~vocabulary.allowed] = float("-inf")
    assert tuple(logits.argmax(-1).tolist()) == texts[0].token_ids[1:]


class Rounding(nn.Module):
    """A model whose logits differ, in batches, by up to 4% of the largest; alone and without a cache they do not."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config, self.device = model.config, model.device
        self.alone = 0

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        if inputs["use_cache"]:
            logits: Tensor = output.logits
            output.logits = logits + 0.04 * (2 * torch.rand_like(logits) - 1) * logits.abs().amax(-1, keepdim=True)
        else:
            self.alone += 1
        return output


@pytest.mark.parametrize("sampling", ["paper", "greedy"])
def test_rounding_decides_nothing(
    model: Any, vocabulary: Vocabulary, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy: Any = Rounding(model)
    expected = written(model, vocabulary, sampling=sampling)
    assert written(noisy, vocabulary, sampling=sampling) != expected
    monkeypatch.setattr(module, "_CLOSE", 0.2)
    noisy.alone = 0
    for size in (1, 3, 8):
        assert written(noisy, vocabulary, sampling=sampling, batch_size=size) == expected
    assert noisy.alone > 0


def test_logits_that_are_not_finite_are_refused(vocabulary: Vocabulary) -> None:
    broken = tiny_llama()
    nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(CheckpointError, match="not finite") as raised:
        written(broken, vocabulary)
    assert_four_lines(raised.value)


# ---- the vocabulary ---------------------------------------------------------------------------------


def test_what_is_no_text_is_left_out() -> None:
    model = tiny_llama(eos_token_id=END)
    model.config.image_token_id = 7
    tokenizer = word_tokenizer({7: "<image>", 9: "<pad>", 12: "<call>"})
    tokenizer.pad_token = "<pad>"
    tokenizer.add_tokens([AddedToken("w11", normalized=False)])
    found = vocabulary_of(model, tokenizer)
    assert set(found.first) == set(range(len(WORDS))) - {UNKNOWN, END, 7, 9, 11, 12}
    assert found.allowed.nonzero()[:, 0].tolist() == [token for token in range(len(WORDS)) if token not in (7, 9)]
    assert found.ends == {UNKNOWN, END, 12}
    assert found.start == ()


def test_ends_of_model_and_tokenizer() -> None:
    chat = tiny_llama()
    chat.generation_config = transformers.GenerationConfig(eos_token_id=[3, 4, 10_000])
    tokenizer = word_tokenizer()
    tokenizer.pad_token = "w4"
    found = vocabulary_of(chat, tokenizer)
    assert found.ends == {UNKNOWN, END, 3, 4}
    assert bool(found.allowed.all())
    assert not {3, 4} & set(found.first)


def test_a_tokenizer_of_another_model_is_refused(model: Any) -> None:
    small = tiny_llama(vocab_size=2, eos_token_id=None)
    with pytest.raises(ConfigError, match="no token of text") as raised:
        vocabulary_of(small, word_tokenizer())
    assert_four_lines(raised.value)


def test_decoded_text() -> None:
    assert decoded(word_tokenizer(), (2, 3, 2)) == "w2 w3 w2"
