"""Zero-shot multiple choice: which of several endings a model finds likeliest.

A file has one record a line, in one of the two forms in which the public files of PIQA, ARC, COPA, OpenBookQA (the
first) and WinoGrande (the second) are:

    {"query": "Question: ...", "choices": ["...", "..."], "gold": 1}
    {"context_options": ["... because Ann", "... because Eve"], "continuation": "was late.", "gold": 0}

A query with a line that begins with "Question:" is followed by one that begins with "Answer:", unless it ends with one;
a choice follows behind a space.

With l_k the log-likelihood of ending k behind its beginning, summed over its tokens (in nats):

    accuracy            = share of questions whose right ending has the highest l_k
    accuracy_norm       = the same of l_k per character of the ending
    margin              = mean of l_right - max of l_wrong

and beside a reference model, which sees damage long before accuracy does:

    flips               = share of questions that are right in one of the two models only
    margin_change       = mean of |margin - margin of the reference|

Axes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from eqat_eval.finite import not_finite
from eqat_eval.inference import inference
from eqat_mm.data.user_files import decode_utf8, parse_json, printable, read_bytes, shown
from eqat_mm.errors import DataError
from eqat_mm.runtime.progress import progress

FORMS = (
    'records such as {"query": "Question: ...", "choices": ["...", "..."], "gold": 0} or '
    '{"context_options": ["...", "..."], "continuation": "...", "gold": 0}, one a line'
)
_ASKS, _ANSWERED = re.compile(r"^Question:", re.MULTILINE), "Answer:"


@dataclass(frozen=True)
class Item:
    """A question.

    Attributes:
        options: beginning and ending of each possible text.
        gold: which of them is right.
    """

    options: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True)
class Choices:
    """What `summary` found; of a reference, None without one. Accuracies and flips are from 0 to 1, margins in nats."""

    questions: int
    accuracy: float
    accuracy_norm: float
    margin: float
    reference_accuracy: float | None
    flips: float | None
    margin_change: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """What a model makes of a question: whether it is right, also per character, and by how much (nats)."""

    right: bool
    right_norm: bool
    margin: float


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """Return the questions of a file, the first `limit` of them.

    Raises:
        DataError: no such file, not UTF-8, a record of another form (the message names the line), or no record.
    """
    lines = decode_utf8(read_bytes(path, FORMS), path).splitlines()
    records = ((f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip())
    items = [_item(parse_json(line, where, FORMS), where) for where, line in records]
    if not items:
        raise DataError(printable(path), "no question", FORMS, "check the path")
    return items[:limit]


def _item(record: Any, where: str) -> Item:
    given = record if isinstance(record, dict) else {}
    if "context_options" in given:
        endings = [_text(given.get("continuation"), f"{where}, continuation")]
        options = [(begin, endings[0]) for begin in _texts(given["context_options"], f"{where}, context_options")]
    else:
        query = _text(given.get("query"), f"{where}, query")
        options = [(_before(query), choice) for choice in _texts(given.get("choices"), f"{where}, choices")]
    gold = given.get("gold")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(options):
        raise _odd(f"{where}, gold", gold, f"the number of the right one, from 0 to {len(options) - 1}")
    return Item(tuple(options), gold)


def _texts(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or len(value) < 2:
        raise _odd(where, value, "a list of two texts or more")
    return [_text(each, where) for each in value]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _odd(where, value, "a text that is not blank")
    return value.strip()


def _odd(where: str, value: Any, allowed: str) -> DataError:
    return DataError(printable(where), shown(value), allowed, f"write {FORMS}")


def _before(query: str) -> str:
    asks = _ASKS.search(query) and not query.endswith(_ANSWERED)
    return f"{query}\n{_ANSWERED}" if asks else query


def likelihoods(
    model: PreTrainedModel, tokenizer: Any, items: Sequence[Item], batch_size: int = 1
) -> list[list[float]]:
    """Return the log-likelihood of every ending of every question, in nats.

    Args:
        model: a causal LM.
        tokenizer: its own; what it puts before a text stands before the beginning.
        items: the questions.
        batch_size: texts per forward, those of similar length together.

    Raises:
        DataError: an ending of which no token is left behind its beginning.
        CheckpointError: the model's predictions are not finite.
    """
    texts = [_tokens(tokenizer, *option) for item in items for option in item.options]
    order = sorted(range(len(texts)), key=lambda at: -len(texts[at][0]))
    found = [0.0] * len(texts)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with inference(model):
        for batch in progress(batches, what="choices", total=len(batches), unit="batch"):
            for at, value in zip(batch, _of_batch(model, [texts[at] for at in batch]), strict=True):
                found[at] = value
    rest = iter(found)
    return [[next(rest) for _ in item.options] for item in items]


def _tokens(tokenizer: Any, begin: str, ending: str) -> tuple[list[int], int]:
    """Return the tokens of a text, and how many of them are its beginning's."""
    whole, before = (list(tokenizer(text)["input_ids"]) for text in (f"{begin} {ending}", begin))
    start = next((at for at, pair in enumerate(zip(whole, before, strict=False)) if pair[0] != pair[1]), len(before))
    if not 0 < start < len(whole):
        raise DataError(
            "a choice", f"{ending!r:.60} behind {begin!r:.60}", "a text with tokens of its own", "leave it out"
        )
    return whole, start


def _of_batch(model: PreTrainedModel, texts: Sequence[tuple[list[int], int]]) -> Iterator[float]:
    rows = [torch.tensor(ids) for ids, _ in texts]
    ids_BT = pad_sequence(rows, batch_first=True).to(model.device)
    mask_BT = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(model.device)
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    for logits_TV, ids_T, (ids, start) in zip(logits_BTV, ids_BT, texts, strict=True):
        value = _likelihood(logits_TV[start - 1 : len(ids) - 1], ids_T[start : len(ids)])
        if not math.isfinite(value):
            raise not_finite(model, f"the log-likelihood of a choice is {value}")
        yield value


def _likelihood(logits_RV: Tensor, ids_R: Tensor) -> float:
    return -float(torch.nn.functional.cross_entropy(logits_RV.float(), ids_R, reduction="sum"))


def summary(
    items: Sequence[Item], found: Sequence[Sequence[float]], reference: Sequence[Sequence[float]] | None = None
) -> Choices:
    """Return the figures of a model, given log-likelihoods of its own and of a reference."""
    own = [_verdict(*each) for each in zip(items, found, strict=True)]
    theirs = None if reference is None else [_verdict(*each) for each in zip(items, reference, strict=True)]
    pairs = None if theirs is None else list(zip(own, theirs, strict=True))
    return Choices(
        questions=len(items),
        accuracy=_mean([each.right for each in own]),
        accuracy_norm=_mean([each.right_norm for each in own]),
        margin=_mean([each.margin for each in own]),
        reference_accuracy=None if theirs is None else _mean([each.right for each in theirs]),
        flips=None if pairs is None else _mean([a.right != b.right for a, b in pairs]),
        margin_change=None if pairs is None else _mean([abs(a.margin - b.margin) for a, b in pairs]),
    )


def _verdict(item: Item, found: Sequence[float]) -> Verdict:
    each = [value / len(ending) for value, (_, ending) in zip(found, item.options, strict=True)]
    wrong = max(value for at, value in enumerate(found) if at != item.gold)
    margin = found[item.gold] - wrong
    return Verdict(margin > 0, each[item.gold] > max(v for at, v in enumerate(each) if at != item.gold), margin)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
