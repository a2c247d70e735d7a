"""Windows hold exactly the documents' tokens, each document closed by the end-of-sequence token."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from eqat_mm.data.text import windows as module
from eqat_mm.data.text.documents import split_documents
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.data.text.windows import pack_windows, text_windows
from eqat_mm.errors import ConfigError, DataError

END = 1


def _document(index: int) -> str:
    return " ".join(f"w{(index + step) % 100}" for step in range(1 + index % 5))


def _ids(document: str) -> list[int]:
    return [2 + int(word[1:]) for word in document.split()] + [END]


DOCUMENTS = [_document(index) for index in range(300)]


def test_one_document_is_cut_into_full_windows(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = pack_windows(tokenizer, ["w0 w1 w2 w3 w4 w5 w6"], 3, seed=0)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [[2, 3, 4], [5, 6, 7]]  # w6 and the end do not fill a third


def test_the_stream_is_the_shuffled_documents_with_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = ["w0 w1 w2", "w10", "w20 w21"]
    stream = pack_windows(tokenizer, documents, 1, seed=3).flatten().tolist()
    ends = [position for position, token in enumerate(stream) if token == END]
    starts = [0, *(end + 1 for end in ends[:-1])]
    packed = [stream[start : end + 1] for start, end in zip(starts, ends, strict=True)]
    assert sorted(packed) == sorted(_ids(document) for document in documents)


def test_a_count_gives_the_beginning_of_the_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = pack_windows(tokenizer, DOCUMENTS, 16, seed=2)
    some = pack_windows(tokenizer, DOCUMENTS, 16, 5, seed=2)
    assert torch.equal(some, whole[:5])
    assert some.untyped_storage().nbytes() == some.nbytes  # not a view that keeps all tokens alive


def test_order_follows_the_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    first = pack_windows(tokenizer, DOCUMENTS, 8, seed=0)
    assert torch.equal(first, pack_windows(tokenizer, DOCUMENTS, 8, seed=0))
    assert not torch.equal(first, pack_windows(tokenizer, DOCUMENTS, 8, seed=1))


def test_no_more_documents_are_tokenised_than_needed(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = module._encode

    def counting(tokenizer: Any, documents: list[str], end: int) -> list[torch.Tensor]:
        seen.append(len(documents))
        return encode(tokenizer, documents, end)

    monkeypatch.setattr(module, "_encode", counting)
    pack_windows(tokenizer, DOCUMENTS, 4, 2, seed=0)
    assert seen == [module._DOCUMENTS_PER_BATCH]


@pytest.mark.parametrize("per_batch", [1, 7, 1000])
def test_batching_does_not_show(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, per_batch: int
) -> None:
    expected = pack_windows(tokenizer, DOCUMENTS, 8, seed=0)
    monkeypatch.setattr(module, "_DOCUMENTS_PER_BATCH", per_batch)
    assert torch.equal(pack_windows(tokenizer, DOCUMENTS, 8, seed=0), expected)


def test_exactly_enough_text_is_enough(tokenizer: PreTrainedTokenizerFast) -> None:
    assert pack_windows(tokenizer, ["w0 w1 w2"], 2, 2, seed=0).tolist() == [[2, 3], [4, END]]


@pytest.mark.parametrize(("count", "needed"), [(None, 5), (1, 5), (3, 15)])
def test_too_little_text_says_how_much_is_missing(
    tokenizer: PreTrainedTokenizerFast, count: int | None, needed: int
) -> None:
    with pytest.raises(DataError) as caught:
        pack_windows(tokenizer, ["w0 w1 w2"], 5, count, seed=0)
    assert caught.value.given == "4 tokens in 1 documents"
    assert f"at least {needed} tokens" in caught.value.allowed


def test_no_documents_is_too_little_text(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="0 tokens in 0 documents"):
        pack_windows(tokenizer, [], 5, seed=0)


def test_a_tokenizer_without_an_end_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        pack_windows(tokenizer, DOCUMENTS, 4, seed=0)


@pytest.mark.parametrize(
    "wrong",
    [{"part": "test"}, {"held_out_fraction": 0.0}, {"held_out_fraction": 1.0}, {"length": 1}, {"count": 0}],
)
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        TextWindows(**wrong)


def test_the_parts_are_the_sides_of_the_split(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text("\n\n\n".join(DOCUMENTS))
    config = TextWindows(source=str(source), length=2, held_out_fraction=0.3, split_seed=4)
    train, held_out = split_documents(DOCUMENTS, 0.3, seed=4)
    for part, documents in (("train", train), ("held_out", held_out), ("all", DOCUMENTS)):
        windows = text_windows(tokenizer, dataclasses.replace(config, part=part))  # type: ignore[arg-type]
        assert torch.equal(windows, pack_windows(tokenizer, documents, 2, seed=0))


def test_windows_begin_with_what_the_tokenizer_puts_before_a_text(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = tmp_path / "text.txt"
    source.write_text("\n\n\n".join(DOCUMENTS))
    config = TextWindows(source=str(source), length=3, part="all")
    plain = text_windows(tokenizer, dataclasses.replace(config, length=2))
    assert len(text_windows(tokenizer, config)[0]) == 3
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.eos_token} $A", special_tokens=[(tokenizer.eos_token, end)]
    )
    begun = text_windows(tokenizer, config)
    assert torch.equal(begun, torch.cat([torch.full((len(plain), 1), end), plain], 1))
    assert torch.equal(text_windows(tokenizer, dataclasses.replace(config, length=2, begin="none")), plain)
    with pytest.raises(ConfigError, match="of which 1 tokens are the beginning"):
        module._room(1, 1)


# ---- long documents ---------------------------------------------------------------------------------


def book(word: int, tokens: int = 2000) -> str:
    """One word throughout, which the end follows."""
    return " ".join([f"w{word}"] * (tokens - 1))


BOOKS = [book(word) for word in range(20)]


def words_in(windows: torch.Tensor) -> list[set[int]]:
    """The words of each window."""
    return [set(window.tolist()) - {END} for window in windows]


def test_every_long_document_gives_a_window_before_one_gives_a_second(tokenizer: PreTrainedTokenizerFast) -> None:
    found = [word for (word,) in words_in(pack_windows(tokenizer, BOOKS, 64, 32, seed=0))]
    assert len(set(found[:20])) == 20
    assert found[20:] == found[:12]


def test_fewer_windows_than_long_documents_come_from_as_many(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = words_in(pack_windows(tokenizer, BOOKS, 64, 8, seed=0))
    assert len(set.union(*windows)) == 8


def test_a_huge_document_does_not_decide_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    """One that could fill the count, among many that cannot, wherever it comes."""
    for seed in range(5):
        windows = pack_windows(tokenizer, [book(99, 100_000), *DOCUMENTS], 16, 40, seed=seed)
        assert sum(words == {2 + 99} for words in words_in(windows)) <= 2
        assert windows.shape == (40, 16)


def test_windows_in_turn_hold_all_the_text_there_is(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [book(word, tokens) for word, tokens in enumerate([200, 23, 30, 7])]
    windows = pack_windows(tokenizer, documents, 10, 25, seed=0)
    assert torch.equal(windows, pack_windows(tokenizer, documents, 10, 25, seed=0))
    tokens = windows.flatten().tolist()
    assert all(tokens.count(2 + word) <= most for word, most in enumerate([199, 22, 29, 6]))
    with pytest.raises(DataError, match="at least 270 tokens"):
        pack_windows(tokenizer, documents, 10, 27, seed=0)


def test_documents_that_a_cut_leaves_too_short_are_read_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    """Words of so many spaces that a beginning holds fewer tokens than it should."""
    wide = [(" " * 50).join([f"w{word}"] * 100) for word in range(4)]
    found = words_in(pack_windows(tokenizer, wide, 5, 8, seed=0))
    assert len(set.union(*found)) == 4
    assert len(found) == 8


def test_only_the_beginning_of_a_long_document_is_tokenised(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, seen = [book(word, 100_000) for word in range(8)], []
    encode = module._encode

    def counting(tokenizer: Any, documents: list[str], end: int) -> list[torch.Tensor]:
        seen.append(sum(map(len, documents)))
        return encode(tokenizer, documents, end)

    monkeypatch.setattr(module, "_encode", counting)
    monkeypatch.setattr(module, "_CHARACTERS_PER_BATCH", 2**10)
    windows = pack_windows(tokenizer, long, 16, 10, seed=0)
    assert len(set.union(*words_in(windows))) == 8
    assert sum(seen) < 1.1 * len(long[0])


def test_a_single_document_says_how_it_can_be_used(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = tmp_path / "book.txt"
    source.write_text("w0 w1\n\nw2 w3\n\nw4 w5", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        text_windows(tokenizer, TextWindows(source=str(source), length=2))
    assert "--calibration.part all" in caught.value.do
    assert len(text_windows(tokenizer, TextWindows(source=str(source), length=2, part="all"))) == 3
