"""Windows hold exactly the documents' tokens, each document closed by the end-of-sequence token."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from eqat_mm.data import windows as module
from eqat_mm.data.documents import split_documents
from eqat_mm.data.windows import TextWindows, pack_windows, text_windows
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

    def counting(tokenizer: Any, documents: list[str], end: int) -> torch.Tensor:
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


@pytest.mark.parametrize(("length", "count"), [(0, None), (4, 0), (-1, 1)])
def test_sizes_below_one_are_refused(tokenizer: PreTrainedTokenizerFast, length: int, count: int | None) -> None:
    with pytest.raises(ConfigError, match="1 or more"):
        pack_windows(tokenizer, DOCUMENTS, length, count, seed=0)


@pytest.mark.parametrize(
    "wrong",
    [{"part": "test"}, {"held_out_fraction": 0.0}, {"held_out_fraction": 1.0}, {"length": 0}, {"count": 0}],
)
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        TextWindows(**wrong)


def test_the_parts_are_the_sides_of_the_split(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text("\n\n\n".join(DOCUMENTS))
    config = TextWindows(source=str(source), length=1, held_out_fraction=0.3, split_seed=4)
    train, held_out = split_documents(DOCUMENTS, 0.3, seed=4)
    for part, documents in (("train", train), ("held_out", held_out), ("all", DOCUMENTS)):
        windows = text_windows(tokenizer, dataclasses.replace(config, part=part))  # type: ignore[arg-type]
        assert torch.equal(windows, pack_windows(tokenizer, documents, 1, seed=0))
