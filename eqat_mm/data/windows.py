"""Windows of tokens: documents tokenised, joined with the end-of-sequence token, cut to one length.

Windows are full: no padding and no attention mask. A document may run over into the next window, as in pretraining; the
tokens after the last full window are dropped. Where a few long documents would fill the windows that are asked for,
every one gives its first window, then its second, until there are enough: the more documents, the less any one decides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eqat_mm.data.documents import load_documents, split_documents
from eqat_mm.data.hub import PUBLIC
from eqat_mm.data.text_files import SOURCES
from eqat_mm.errors import ConfigError, DataError
from eqat_mm.runtime.progress import progress
from eqat_mm.runtime.seeding import generator
from eqat_mm.runtime.settings import Count, Length, Seed, Settings, Share

_DOCUMENTS_PER_BATCH = 64
_CHARACTERS_PER_BATCH = 2**20
_DOCUMENTS_WITHOUT_BAR = 1024
_FEW_DOCUMENTS = 8
_MOST_PER_DOCUMENT = 4
_MOST_PER_TOKEN = 8
"""Characters, more than a token has on the average."""


@dataclass(frozen=True)
class TextWindows(Settings, option="data"):
    """Which text, and how it is cut.

    Args:
        source: where the documents come from (see `eqat_mm.data.documents`); there is no text by default.
        part: `train` or `held_out` side of the split by document, or `all` of them.
        length: tokens in a window.
        count: number of windows; None takes all the text.
        held_out_fraction: share of the documents held out.
        seed: order of the documents.
        split_seed: which documents are held out; the same for training and evaluation.
    """

    source: str | None = None
    part: Literal["train", "held_out", "all"] = "train"
    length: Length = 2048
    count: Count | None = None
    held_out_fraction: Share = 0.1
    seed: Seed = 0
    split_seed: Seed = 0

    def require_source(self, option: str) -> None:
        """Check that text is named, before any work.

        Args:
            option: that names it, for the message.

        Raises:
            ConfigError: none is.
        """
        if self.source is None:
            raise ConfigError(option, "no text", f"{SOURCES}, such as {' or '.join(PUBLIC)}", f"name one with {option}")


def text_windows(tokenizer: PreTrainedTokenizerBase, config: TextWindows) -> Tensor:
    """Load, split and pack the text that `config` names, for training as for evaluation.

    Returns:
        Token ids, int64 [windows, length].

    Raises:
        DataError: unreadable text, or not enough of it.
        ConfigError: a package is missing, or the tokenizer has no end-of-sequence token.
    """
    config.require_source("source")
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

    Every document is followed by the end-of-sequence token; the tokenizer adds nothing else. With `count`, only as many
    documents are tokenised as it takes. Where one would fill several windows and an eighth of all, or they would fill
    more than four each, every document gives one window in turn.

    Args:
        tokenizer: with an end-of-sequence token.
        documents: texts.
        length: tokens of a window, 1 or more.
        count: number of windows, 1 or more; None takes all the text.
        seed: of the order.

    Returns:
        Token ids, int64 [windows, length], where windows is `count` if given.

    Raises:
        DataError: too little text for `count` windows, or for a single one.
        ConfigError: a tokenizer without an end-of-sequence token.
    """
    assert length > 0
    assert count is None or count > 0
    end = _end_token(tokenizer)
    needed = None if count is None else count * length
    shuffled = _shuffled(documents, seed)
    pieces: list[Tensor] = []
    found = 0
    for piece in _encoded(tokenizer, shuffled, len(shuffled), end):
        pieces.append(piece)
        found += len(piece)
        if needed is not None and found >= needed:
            break
    windows = found // length if count is None else count
    if found < max(windows, 1) * length:
        raise _too_little_text(len(documents), found, max(windows, 1), length)
    if count is not None and len(pieces) < len(documents) and _few_decide(pieces, length, count):
        return _in_turn(tokenizer, shuffled, length, count, end)
    return torch.cat(pieces)[: windows * length].view(windows, length).clone()


def _few_decide(pieces: list[Tensor], length: int, count: int) -> bool:
    """Whether of the documents that fill `count` windows one fills several and an eighth of them, or all fill many."""
    missing = count * length - sum(map(len, pieces[:-1]))
    largest = max([min(missing, len(pieces[-1])), *map(len, pieces[:-1])])
    return largest >= length * max(2, count / _FEW_DOCUMENTS) or len(pieces) < count / _MOST_PER_DOCUMENT


def _in_turn(tokenizer: PreTrainedTokenizerBase, documents: list[str], length: int, count: int, end: int) -> Tensor:
    """Return `count` windows, of every document its first, then of every document its second, and so on.

    Of long documents, first only the beginning is tokenised that should be enough.
    """
    enough = _MOST_PER_TOKEN * length * -(-count // len(documents))
    for most in (enough, max(map(len, documents))):
        beginnings = (_beginning(document, most) for document in documents)
        whole = [len(document) <= most for document in documents]
        rounds = _rounds(_encoded(tokenizer, beginnings, len(documents), end), whole, length, count)
        windows = [window for each in rounds for window in each]
        if len(windows) >= count:
            break
    return torch.stack(windows[:count])


def _rounds(encoded: Iterator[Tensor], whole: list[bool], length: int, count: int) -> list[list[Tensor]]:
    """Return the windows of documents, int64 [length] each: those that come first in a document, second, and so on.

    What is left of whole documents behind their last window is joined to windows that come first.
    """
    rounds: list[list[Tensor]] = [[]]
    left = torch.empty(0, dtype=torch.int64)
    for tokens, is_whole in zip(encoded, whole, strict=False):
        *windows, rest = tokens.split(length) if len(tokens) % length else (*tokens.split(length), tokens[:0])
        rounds += [[] for _ in range(len(windows) - len(rounds))]
        for place, window in zip(rounds, windows, strict=False):
            place.append(window)
        if is_whole:
            left = torch.cat([left, rest])
        if len(left) >= length:
            rounds[0].append(left[:length])
            left = left[length:]
        if len(rounds[0]) >= count:
            break
    return rounds


def _beginning(document: str, most: int) -> str:
    """Return a document, cut behind a space to `most` characters where it has more."""
    if len(document) <= most:
        return document
    return document[: document.rfind(" ", 0, most) + 1] or document[:most]


def _documents_of(config: TextWindows) -> list[str]:
    assert config.source is not None
    documents = load_documents(config.source)
    if config.part == "all":
        return documents
    train, held_out = split_documents(documents, config.held_out_fraction, config.split_seed)
    return train if config.part == "train" else held_out


def _shuffled(documents: list[str], seed: int) -> list[str]:
    order = torch.randperm(len(documents), generator=generator(seed, "document order")).tolist()
    return [documents[index] for index in order]


def _encoded(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], count: int, end: int) -> Iterator[Tensor]:
    """Yield the tokens of each of `count` documents and the end, int64 [T]."""
    encoded = (tokens for batch in _batches(documents) for tokens in _encode(tokenizer, batch, end))
    is_long = count > _DOCUMENTS_WITHOUT_BAR
    yield from progress(encoded, what="tokenise", total=count, unit="document") if is_long else encoded


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Yield the documents in batches, not too many and not too long together."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        if batch and (len(batch) == _DOCUMENTS_PER_BATCH or characters + len(document) > _CHARACTERS_PER_BATCH):
            yield batch
            batch, characters = [], 0
        batch.append(document)
        characters += len(document)
    if batch:
        yield batch


def _encode(tokenizer: PreTrainedTokenizerBase, documents: list[str], end: int) -> list[Tensor]:
    # verbose=False: documents longer than the model's context are expected, they are cut afterwards.
    encoded = tokenizer(documents, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return [torch.tensor([*document, end], dtype=torch.int64) for document in ids]


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


def _too_little_text(documents: int, found: int, windows: int, length: int) -> DataError:
    return DataError(
        "text windows",
        f"{found} tokens in {documents} documents",
        f"at least {windows * length} tokens for {windows} windows of {length}",
        f"give more text, or lower count (now {found // length} fit) or length",
    )
