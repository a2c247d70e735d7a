"""Questions about the same images: what their prompts begin with, up to the last image, is read once for all of them.

    prompts     [text, images | question 1]        fronts      [text, images]        read once each
                [text, images | question 2]   ->   rests       [question 1], [question 2]

Of a LLaVA-1.5 prompt the front is nine tenths: 576 tokens of an image before a question of 50. The keys and values of a
front are those that each of its prompts would compute, as long as no token sees what comes behind it and a position is
a count of tokens; `obstacle` says for which models this does not hold.

Axes: B prompts, F fronts, P tokens of the longest front, R tokens of the longest rest.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from eqat_mm.blocks.attention import kv_cache_bits
from eqat_mm.data.image_text.columns import images_of, rows_of
from eqat_mm.quant.bit_widths import UNQUANTIZED

Row = dict[str, Tensor]
"""What a model reads of one prompt: rows of tokens [T, ...], and what belongs to images."""

_ROWS = {"input_ids", "attention_mask"}


def obstacle(model: Any) -> str | None:
    """Say why what prompts of `model` have in common cannot be read once; None where it can."""
    config = model.config.get_text_config(decoder=True)
    if kv_cache_bits(model) != UNQUANTIZED:
        return "its cache is of integers, which what follows would see rounded"
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers):
        return "some of its layers do not see the whole text (sliding windows)"
    if any(hasattr(module, "rope_deltas") for module in model.modules()):
        return "a position of its tokens is more than a count"
    return None


def batches(
    lengths: Sequence[int], kinds: Sequence[Hashable], images: Sequence[Hashable], size: int
) -> Iterator[list[int]]:
    """Yield indices of prompts in batches: those about the same images together, the longest first.

    Args:
        lengths: of the prompts, in any unit; the longest first means little padding, and early failure.
        kinds: prompts of different kinds are never in one batch.
        images: what tells images apart, of each prompt.
        size: prompts in a batch.
    """
    longest: dict[Hashable, int] = {}
    for length, same in zip(lengths, images, strict=True):
        longest[same] = max(longest.get(same, 0), length)
    order = sorted(range(len(lengths)), key=lambda at: (-longest[images[at]], repr(images[at]), -lengths[at]))
    for kind in dict.fromkeys(kinds):
        alike = [at for at in order if kinds[at] == kind]
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def digest(images: Iterable[Any]) -> Hashable:
    """Return what tells images from others; what is no image of PIL's is like no other."""
    found = blake2b(digest_size=16)
    for image in images:
        if not hasattr(image, "mode"):
            return object()
        found.update(repr((image.size, image.mode)).encode())
        found.update(image.tobytes())
    return found.digest()


@dataclass(frozen=True)
class Read:
    """Fronts that were read, one for each prompt of a batch.

    Attributes:
        cache: their keys and values, [B, ...].
        ids_BP: their tokens, padded on the left.
        mask_BP: where there are tokens.
    """

    cache: Cache
    ids_BP: Tensor
    mask_BP: Tensor


@dataclass(frozen=True)
class Fronts:
    """What of a batch of prompts is read already: nothing, or of each its front.

    Attributes:
        lengths: tokens of each prompt that are read.
        read: what they gave.
    """

    lengths: list[int]
    read: Read | None = None

    def rests(self, rows: Sequence[Row]) -> list[Row]:
        """Return what is left to read of the prompts."""
        return [
            {name: value[length:] for name, value in rows_of(row).items()} if length else row
            for row, length in zip(rows, self.lengths, strict=True)
        ]

    def for_forward(self, rests: Row) -> dict[str, Any]:
        """Return what a forward of the rests takes, given as a batch padded on the right."""
        if self.read is None:
            return {**rests, "use_cache": False}
        mask_BN = torch.cat([self.read.mask_BP, rests["attention_mask"]], dim=1)
        positions_BR = (mask_BN.cumsum(1) - 1)[:, self.read.mask_BP.shape[1] :]
        inputs = {"input_ids": rests["input_ids"], "attention_mask": mask_BN, "position_ids": positions_BR}
        return inputs | {"past_key_values": self.read.cache}

    def for_generate(self, rests: Row) -> dict[str, Any]:
        """Return what `generate` takes: the prompts, given their rests as a batch padded on the left."""
        if self.read is None:
            return {**rests}
        ids_BN = torch.cat([self.read.ids_BP, rests["input_ids"]], dim=1)
        mask_BN = torch.cat([self.read.mask_BP, rests["attention_mask"]], dim=1)
        return {"input_ids": ids_BN, "attention_mask": mask_BN, "past_key_values": self.read.cache}


def read_fronts(
    model: Any,
    rows: Sequence[Row],
    image_token: int,
    batched: Callable[[list[Row], Literal["left"]], Row],
    ends: Sequence[int] | None = None,
) -> Fronts:
    """Read what the prompts of a batch begin with; call in inference mode, with a model that has no `obstacle`.

    Nothing is read where it does not pay: fewer than two prompts a front, prompts without an image, or with tokens of
    several kinds.

    Args:
        model: that answers.
        rows: the prompts.
        image_token: id of the tokens in an image's place.
        batched: puts rows together, padded on that side, where the model is.
        ends: tokens of each prompt, where answers stand behind them; the last one is left to read.
    """
    ends = [len(row["input_ids"]) for row in rows] if ends is None else ends
    lengths = [_front(row, image_token, end) for row, end in zip(rows, ends, strict=True)]
    if not all(lengths) or any(rows_of(row).keys() - _ROWS for row in rows):
        return nothing_read(rows)
    cuts = [_cut(row, length) for row, length in zip(rows, lengths, strict=True)]
    keys = [_key(cut) for cut in cuts]
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    if 2 * len(places) > len(rows):
        return nothing_read(rows)
    fronts = batched([cuts[keys.index(key)] for key in places], "left")
    of_B = torch.tensor([places[key] for key in keys], device=fronts["input_ids"].device)
    return Fronts(lengths, _repeated(fronts, _cache_of(model, fronts), of_B))


def nothing_read(rows: Sequence[Row]) -> Fronts:
    """Return that of these prompts nothing is read."""
    return Fronts([0] * len(rows))


def _cache_of(model: Any, fronts: Row) -> Cache:
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    positions_FP = (fronts["attention_mask"].cumsum(1) - 1).clamp(min=0)
    model(**fronts, position_ids=positions_FP, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _repeated(fronts: Row, cache: Cache, of_B: Tensor) -> Read:
    cache.batch_select_indices(of_B)
    return Read(cache, fronts["input_ids"][of_B], fronts["attention_mask"][of_B])


def _front(row: Row, image_token: int, end: int) -> int:
    """Return how many tokens of a prompt go up to its last image; 0 where there is none, or nothing behind it."""
    places = (row["input_ids"] == image_token).nonzero()
    length = int(places[-1]) + 1 if len(places) else 0
    return length if length < end else 0


def _cut(row: Row, length: int) -> Row:
    return {name: value[:length] for name, value in rows_of(row).items()} | images_of(row)


def _key(cut: Row) -> bytes:
    found = blake2b(digest_size=16)
    for name, value in sorted(cut.items()):
        found.update(f"{name} {tuple(value.shape)}".encode())
        found.update(value.contiguous().numpy().tobytes())
    return found.digest()
