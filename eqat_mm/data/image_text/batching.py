"""Batches of image-text samples: in which order samples come, and how they are put together.

Samples of similar length share a step, by transformers' own grouping, so that little is padded. In the warm-up from
text to image and text, step t of W takes the share 1 - t/W of its samples from those without images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import get_length_grouped_indices

from eqat_mm.data.image_text.chat import IGNORED
from eqat_mm.data.image_text.columns import images_of, rows_of
from eqat_mm.errors import DataError
from eqat_mm.runtime.seeding import generator


class SampleOrder(Sampler[int]):
    """The order of samples: a pure function of seed and epoch, the same on every rank.

    It is for a sampler that is cut into batches, and these over the ranks, in this order; accelerate does so. Nothing
    is drawn from torch's global generator, so that a run that is continued needs no state.

    Args:
        lengths: tokens of each sample.
        text_only: for each sample, whether it has no image.
        batch: samples in one optimizer step, over all devices and accumulated forwards.
        seed: of the order.
        text_warmup_steps: optimizer steps at the beginning of the first epoch with samples without images in them:
            all of the first step's, none after the last.

    Raises:
        DataError: too few samples without images, or with, for the warm-up.
    """

    def __init__(
        self, lengths: Sequence[int], text_only: Sequence[bool], batch: int, *, seed: int, text_warmup_steps: int = 0
    ) -> None:
        assert len(lengths) == len(text_only)
        self._lengths = list(lengths)
        self._text = [index for index, is_text in enumerate(text_only) if is_text]
        self._image = [index for index, is_text in enumerate(text_only) if not is_text]
        self._batch = batch
        self._seed = seed
        self._texts = [round(batch * (1 - step / text_warmup_steps)) for step in range(text_warmup_steps)]
        self._require_enough()
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices(self.epoch))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is iterated next."""
        self.epoch = epoch

    def indices(self, epoch: int) -> list[int]:
        """Return the samples of one epoch, every one once."""
        draw = generator(self._seed, "image-text order", epoch)
        warmup = self._warmup(draw) if epoch == 0 else []
        used = set(warmup)
        rest = [index for index in range(len(self)) if index not in used]
        if not rest:
            return warmup
        grouped = get_length_grouped_indices([self._lengths[index] for index in rest], self._batch, generator=draw)
        return warmup + [rest[position] for position in grouped]

    def _warmup(self, draw: torch.Generator) -> list[int]:
        texts, images = (_shuffled(indices, draw) for indices in (self._text, self._image))
        order: list[int] = []
        for count in self._texts:
            step = [next(texts) for _ in range(count)] + [next(images) for _ in range(self._batch - count)]
            order += sorted(step, key=lambda index: self._lengths[index], reverse=True)
        return order

    def _require_enough(self) -> None:
        needed = (sum(self._texts), len(self._texts) * self._batch - sum(self._texts))
        if len(self._text) < needed[0] or len(self._image) < needed[1]:
            raise DataError(
                f"warm-up of {len(self._texts)} steps of {self._batch} samples",
                f"{len(self._text):,} samples without images and {len(self._image):,} with",
                f"at least {needed[0]:,} and {needed[1]:,}",
                "lower text_warmup_steps, or add samples",
            )


class Collator:
    """Puts samples together: pads tokens, joins images.

    Args:
        tokenizer: gives the padding token.
        padding_side: `left` or `right`; by default the tokenizer's.
        filling: of rows other than ids, mask and labels, by name; zero by default.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        padding_side: str | None = None,
        filling: Mapping[str, int] | None = None,
    ) -> None:
        # Where there is no padding token any will do: it is masked and not predicted.
        known = (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(token, int))
        self._fill = {"input_ids": next(known, 0), "labels": IGNORED, **(filling or {})}
        self._side = padding_side or tokenizer.padding_side
        assert self._side in ("left", "right")

    def __call__(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return one batch.

        Args:
            samples: rows of tokens, [T_i, ...]: `input_ids`, `labels` where they are to be learned, and others; what is
                no row belongs to images, [images_i, ...].

        Returns:
            Rows [samples, T, ...], `attention_mask` among them; one that a sample lacks, as windows of text lack kinds
            of tokens, is filled up. Other tensors [images, ...], where any sample has them: those of all samples in
            order. Axes that differ (tiles, height, width) are filled up with zeros.
        """
        samples = [{"attention_mask": torch.ones_like(sample["input_ids"])} | sample for sample in samples]
        rows = [rows_of(sample) for sample in samples]
        names = dict.fromkeys(name for row in rows for name in row)
        others = [images_of(sample) for sample in samples]
        batch = {name: self._stacked(name, rows) for name in names}
        return batch | {
            name: torch.cat(_filled_up([other[name] for other in others if name in other], first=1))
            for name in dict.fromkeys(name for other in others for name in other)
        }

    def filled(self, sample: dict[str, Tensor], length: int) -> dict[str, Tensor]:
        """Return a batch of one sample, its rows filled up on the right to a length, [1, length, ...]."""
        rows = rows_of({"attention_mask": torch.ones_like(sample["input_ids"])} | sample)
        missing = (0, length - len(sample["input_ids"]))
        batch = {
            name: functional.pad(row, (0, 0) * (row.dim() - 1) + missing, value=self._fill.get(name, 0)).unsqueeze(0)
            for name, row in rows.items()
        }
        return batch | images_of(sample)

    def _stacked(self, name: str, rows: list[dict[str, Tensor]]) -> Tensor:
        """Return the rows of one name together, [samples, T, ...]."""
        like, fill = next(row[name] for row in rows if name in row), self._fill.get(name, 0)
        lacking = (like.new_full((len(row["input_ids"]), *like.shape[1:]), fill) for row in rows)
        found = _filled_up([row.get(name, other) for row, other in zip(rows, lacking, strict=True)], first=1)
        return pad_sequence(found, batch_first=True, padding_value=fill, padding_side=self._side)


def _filled_up(tensors: list[Tensor], first: int) -> list[Tensor]:
    """Return tensors whose axes from `first` on are as long as the longest, with zeros behind what they hold."""
    most = [max(sizes) for sizes in zip(*(tensor.shape[first:] for tensor in tensors), strict=True)]
    missing = [
        [number for whole, own in zip(most, tensor.shape[first:], strict=True) for number in (whole - own, 0)][::-1]
        for tensor in tensors
    ]
    return [functional.pad(tensor, pads) for tensor, pads in zip(tensors, missing, strict=True)]


def _shuffled(indices: list[int], draw: torch.Generator) -> Iterator[int]:
    return (indices[position] for position in torch.randperm(len(indices), generator=draw).tolist())
