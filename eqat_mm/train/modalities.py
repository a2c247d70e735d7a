"""How much the tokens of a calibration count, by their kind: none that only fill up a sample, text, images.

What the error of a token costs at the end differs by kind: those of an image are many, and much alike. `gradient` lets
each kind count by the mean size of the loss's gradient at the output of each block of the full-precision model, as MBQ
(arXiv 2412.19509) does: to first order an error e of a token changes the loss by g . e. Kinds are compared in the same
samples: what a window of text predicts has gradients of another size than an answer that is nearly certain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eqat_mm.blocks.arch import Inputs
from eqat_mm.runtime.precision import Decided
from eqat_mm.runtime.ranks import Ranks
from eqat_mm.train.held_out import logits_at
from eqat_mm.train.losses import cross_entropy, predictions_that_count

Weights = Literal["equal", "gradient"]

PADDING, TEXT, VISUAL = range(3)
"""Kinds of tokens, columns of `Modalities.of_kind`."""


class Modalities:
    """How much the tokens of samples count, which are noted as they are captured.

    Args:
        visual: tokens that stand for images, int64 [n].
        of_kind: how much a token of each kind counts in each block, float32 [blocks, 3].
    """

    def __init__(self, visual: Tensor, of_kind: Tensor) -> None:
        self._visual = visual
        self._of_kind = of_kind
        self._kinds: list[Tensor] = []

    def noting(self, batches: Iterable[Inputs]) -> Iterator[Inputs]:
        """Yield batches as they are, and note the kinds of their tokens."""
        for batch in batches:
            self._kinds.append(kinds_of(batch, self._visual))
            yield batch

    def at(self, block: int) -> Sequence[Tensor]:
        """Return how much each token counts in a block, [B, T] for each batch that was noted."""
        return [self._of_kind[block][kinds.long()] for kinds in self._kinds]


def kinds_of(batch: Inputs, visual: Tensor) -> Tensor:
    """Return the kind of each token of a batch, uint8 [B, T]."""
    kinds = torch.where(torch.isin(batch["input_ids"], visual), VISUAL, TEXT)
    if "attention_mask" in batch:
        kinds = kinds.where(batch["attention_mask"] != 0, PADDING)
    return kinds.to(torch.uint8)


def equal_weights(blocks: int) -> Tensor:
    """Return weights by which text and images count alike, [blocks, 3]."""
    return torch.tensor([[0.0, 1.0, 1.0]]).repeat(blocks, 1)


def gradient_weights(
    model: Any, blocks: nn.ModuleList, batches: Iterable[Inputs], visual: Tensor, precision: Decided, ranks: Ranks
) -> Tensor:
    """Return the mean absolute gradient at the outputs of blocks, by the kind of the token, [blocks, 3]; of text 1.

    Args:
        model: in full precision, on its device; nothing of it is trained.
        blocks: its decoder blocks.
        batches: of this rank, with `labels`, whose negative log-likelihoods are summed.
        visual: tokens that stand for images, int64 [n].
        precision: of matrix products.
        ranks: those that share the batches; all get the means over those of all.
    """
    device = model.get_input_embeddings().weight.device
    sums = torch.zeros(len(blocks), 3, dtype=torch.float64, device=device)
    counts = torch.zeros(3, dtype=torch.float64, device=device)
    model.requires_grad_(False)
    for batch in batches:
        one_hot = nn.functional.one_hot(kinds_of(batch, visual).long(), 3).to(device).flatten(0, 1).double()
        counts += one_hot.sum(0)
        for index, gradient in enumerate(_gradients(model, blocks, batch, precision, device)):
            sums[index] += gradient.abs().mean(-1).flatten().double() @ one_hot
    ranks.sum_all_([sums, counts])
    counts[PADDING] = torch.inf
    means = (sums / counts.clamp(min=1)).float().cpu()
    return means / means[:, TEXT, None]


def _gradients(
    model: Any, blocks: nn.ModuleList, batch: Inputs, precision: Decided, device: torch.device
) -> list[Tensor]:
    """Return the gradient of the loss at the output of each block, [B, T, H]."""
    found: dict[int, Tensor] = {}

    def begin(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        return embedded.detach().requires_grad_()

    def note(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden.register_hook(lambda gradient: found.__setitem__(index, gradient.detach()))

        return hook

    handles = [model.get_input_embeddings().register_forward_hook(begin)]
    handles += [block.register_forward_hook(note(index)) for index, block in enumerate(blocks)]
    try:
        inputs = {name: value.to(device) for name, value in batch.items()}
        columns, labels = predictions_that_count(inputs["labels"])
        cross_entropy(logits_at(model, inputs, columns, precision), labels, 1).backward()
    finally:
        for handle in handles:
            handle.remove()
    return [found[index] for index in range(len(blocks))]
