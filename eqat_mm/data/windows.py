"""Windows of tokens: documents tokenised, joined with the end-of-sequence token, cut to one length.

Windows are full: no padding and no attention mask. A document may run over into the next window, as
in pretraining; the tokens after the last full window are dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eqat_mm.data.documents import load_documents, split_documents
from eqat_mm.errors import ConfigError, DataError
from eqat_mm.runtime.progress import progress
from eqat_mm.runtime.seeding import generator

_DOCUMENTS_PER_BATCH = 64
_BATCHES_WITHOUT_BAR = 16


@dataclass(frozen=True)
class TextWindows:
    """Which text, and how it is cut.

    Args:
        source: where the documents come from (see `eqat_mm.data.documents`).
        part: `train` or `held_out` side of the split by document, or `all` of them.
        length: tokens in a window.
        count: number of windows; None takes all the text.
        held_out_fraction: share of the documents held out, in (0, 1).
        seed: order of the documents.
        split_seed: which documents are held out; the same for training and evaluation.

    Raises:
        ConfigError: a value outside its range.
    """

    source: str = "demo-wikipedia"
    part: Literal["train", "held_out", "all"] = "train"
    length: int = 2048
    count: int | None = None
    held_out_fraction: float = 0.1
    seed: int = 0
    split_seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        if self.part not in ("train", "held_out", "all"):
            raise ConfigError("TextWindows.part", str(self.part), "train, held_out or all", "pick one")
        if not 0 < self.held_out_fraction < 1:
            raise ConfigError(
                "TextWindows.held_out_fraction",
                str(self.held_out_fraction),
                "a number between 0 and 1",
                "use 0.1, or part: all for text that is not to be split",
            )
        _require_size(self.length, self.count)


def text_windows(tokenizer: PreTrainedTokenizerBase, config: TextWindows) -> Tensor:
    """Load, split and pack the text that `config` names, for training as for evaluation.

    Returns:
        Token ids, int64 [windows, length].

    Raises:
        DataError: unreadable text, or not enough of it.
        ConfigError: a package is missing, or the tokenizer has no end-of-sequence token.
    """
    documents = _documents_of(config)
    return pack_windows(tokenizer, documents, config.length, config.count, seed=config.seed)


def digest_of(windows: Tensor) -> str:
    """Return a hash of token windows, by which changed text is noticed."""
    return hashlib.blake2b(windows.numpy().tobytes(), digest_size=16).hexdigest()


def pack_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: list[str],
    length: int,
    count: int | None = None,
    *,
    seed: int,
) -> Tensor:
    """Pack documents, in an order shuffled by `seed`, into full windows of tokens.

    Every document is followed by the end-of-sequence token; the tokenizer adds nothing else. With
    `count`, only as many documents are tokenised as it takes.

    Returns:
        Token ids, int64 [windows, length], where windows is `count` if given.

    Raises:
        DataError: too little text for `count` windows, or for a single one.
        ConfigError: `length` or `count` below 1, or a tokenizer without an end-of-sequence token.
    """
    _require_size(length, count)
    end = _end_token(tokenizer)
    needed = None if count is None else count * length
    pieces: list[Tensor] = []
    found = 0
    for batch in _batches(documents, seed):
        pieces.append(_encode(tokenizer, batch, end))
        found += len(pieces[-1])
        if needed is not None and found >= needed:
            break
    windows = found // length if count is None else count
    if found < max(windows, 1) * length:
        raise _too_little_text(len(documents), found, max(windows, 1), length)
    return torch.cat(pieces)[: windows * length].view(windows, length).clone()


def _documents_of(config: TextWindows) -> list[str]:
    documents = load_documents(config.source)
    if config.part == "all":
        return documents
    train, held_out = split_documents(documents, config.held_out_fraction, config.split_seed)
    return train if config.part == "train" else held_out


def _batches(documents: list[str], seed: int) -> Iterator[list[str]]:
    order = torch.randperm(len(documents), generator=generator(seed, "document order")).tolist()
    starts = range(0, len(documents), _DOCUMENTS_PER_BATCH)
    is_long = len(starts) > _BATCHES_WITHOUT_BAR
    for start in progress(starts, what="tokenise", unit="batch") if is_long else starts:
        yield [documents[index] for index in order[start : start + _DOCUMENTS_PER_BATCH]]


def _encode(tokenizer: PreTrainedTokenizerBase, documents: list[str], end: int) -> Tensor:
    # verbose=False: documents longer than the model's context are expected, they are cut afterwards.
    encoded = tokenizer(documents, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return torch.tensor([token for document in ids for token in (*document, end)], dtype=torch.int64)


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}",
            "no end-of-sequence token",
            "a tokenizer with eos_token, which separates the documents",
            "set eos_token in its tokenizer_config.json",
        )
    return end


def _require_size(length: int, count: int | None) -> None:
    for name, value in (("length", length), ("count", count)):
        if value is not None and value < 1:
            raise ConfigError(f"text windows: {name}", str(value), "an integer of 1 or more", f"raise {name}")


def _too_little_text(documents: int, found: int, windows: int, length: int) -> DataError:
    return DataError(
        "text windows",
        f"{found} tokens in {documents} documents",
        f"at least {windows * length} tokens for {windows} windows of {length}",
        f"give more text, or lower count (now {found // length} fit) or length",
    )
