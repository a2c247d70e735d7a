"""Windows of tokens: documents tokenised, joined with the end-of-sequence token, cut to one length.

Windows are full: no padding and no attention mask. Each begins with what the tokenizer puts before a text: a model that
was trained to see it says little without. A document may run over into the next window, as in pretraining; the
tokens after the last full window are dropped. Where a few long documents would fill the windows that are asked for,
every one gives its first window, then its second, until there are enough: the more documents, the less any one decides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eqat_mm.data.documents import drawn_documents, load_documents, of_side, split_documents
from eqat_mm.data.text_settings import TextSource, TextWindows, shares
from eqat_mm.data.vocabulary import start_of
from eqat_mm.errors import ConfigError, DataError
from eqat_mm.runtime.progress import progress
from eqat_mm.runtime.seeding import generator

_DOCUMENTS_PER_BATCH = 64
_CHARACTERS_PER_BATCH = 2**20
_DOCUMENTS_WITHOUT_BAR = 1024
_FEW_DOCUMENTS = 8
_MOST_PER_DOCUMENT = 4
_MOST_PER_TOKEN = 8
"""Characters, more than a token has on the average."""

TOO_LITTLE = "text windows"
"""Where an error is said to be that there is less text than was asked for."""


def text_windows(tokenizer: PreTrainedTokenizerBase, config: TextWindows) -> Tensor:
    """Load, split and pack the text that `config` names, for training as for evaluation.

    Returns:
        Token ids, int64 [windows, length].

    Raises:
        DataError: unreadable text, or not enough of it.
        ConfigError: a package is missing, or the tokenizer has no end-of-sequence token.
    """
    config.require_source("source")
    begin = start_of(tokenizer) if config.begin == "auto" else ()
    windows = _texts(tokenizer, replace(config, length=_room(config.length, len(begin))))
    return torch.cat([torch.tensor(begin, dtype=torch.int64).expand(len(windows), -1), windows], 1)


def _room(length: int, begin: int) -> int:
    if length <= begin:
        raise ConfigError(
            where="text windows",
            given=f"a length of {length}, of which {begin} tokens are the beginning of every text",
            allowed="room for text behind them",
            do="raise length, or set begin to none",
        )
    return length - begin


def _texts(tokenizer: PreTrainedTokenizerBase, config: TextWindows) -> Tensor:
    """Return windows of text alone."""
    sources = config.sources
    counts = [config.count] if len(sources) == 1 else shares([each.weight for each in sources], config.count or 0)
    windows = [
        _windows_of(tokenizer, source, replace(config, source=source.path, count=count))
        for source, count in zip(sources, counts, strict=True)
        if count != 0
    ]
    if len(windows) == 1:
        return windows[0]
    order = torch.randperm(sum(map(len, windows)), generator=generator(config.seed, "windows of several texts"))
    return torch.cat(windows)[order]


def _windows_of(tokenizer: PreTrainedTokenizerBase, source: TextSource, config: TextWindows) -> Tensor:
    """Return the windows of one text, which is read as far as it is needed where it is large."""
    field = str(source.text_field)
    drawn = None if config.count is None else drawn_documents(source.path, field, config.seed)
    if drawn is None or config.count is None:
        documents = _side_of(load_documents(source.path, field), config)
        return pack_windows(tokenizer, documents, config.length, config.count, seed=config.seed)
    return _drawn_windows(tokenizer, _of_side(drawn, config), config.length, config.count, config.seed)


def _drawn_windows(
    tokenizer: PreTrainedTokenizerBase, drawn: Iterator[str], length: int, count: int, seed: int
) -> Tensor:
    """Draw as much text as should be enough, and more where it is not, until there is no more."""
    documents: list[str] = []
    characters = _MOST_PER_TOKEN * length
    while True:
        before = len(documents)
        for _ in progress(_gathered(drawn, documents, characters, count), what="draw text", total=count, unit="window"):
            pass
        try:
            return pack_windows(tokenizer, documents, length, count, seed=seed)
        except DataError:
            if len(documents) == before:
                raise
        characters *= 4


def _gathered(drawn: Iterator[str], documents: list[str], window: int, count: int) -> Iterator[None]:
    """Append documents until there is text for `count` windows; yield once for each of them.

    Args:
        drawn: documents.
        documents: what is appended to; what is there counts.
        window: characters that are enough for one.
        count: number of windows. A document counts for `_MOST_PER_DOCUMENT` of them at most.
    """
    found = sum(min(len(document), window * _MOST_PER_DOCUMENT) for document in documents)
    said = 0
    while said < count:
        if found >= (said + 1) * window:
            said += 1
            yield
        elif (document := next(drawn, None)) is None:
            return
        else:
            documents.append(document)
            found += min(len(document), window * _MOST_PER_DOCUMENT)


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


def _of_side(documents: Iterator[str], config: TextWindows) -> Iterator[str]:
    if config.part == "all":
        return documents
    return of_side(documents, config.part == "held_out", config.held_out_fraction, config.split_seed)


def _side_of(documents: list[str], config: TextWindows) -> list[str]:
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
        TOO_LITTLE,
        f"{found} tokens in {documents} documents",
        f"at least {windows * length} tokens for {windows} windows of {length}",
        f"give more text, or lower count (now {found // length} fit) or length",
    )
