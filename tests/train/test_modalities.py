"""How much tokens count by their kind, against gradients that are computed here in another way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from eqat_mm.runtime.ranks import ALONE, Ranks
from eqat_mm.train.modalities import PADDING, TEXT, VISUAL, Modalities, equal_weights, gradient_weights, kinds_of
from llava_adapters import arch_for
from tests.thread_ranks import in_threads
from tests.tolerances import assert_close

IMAGE = torch.tensor([96])
KINDS = [PADDING, TEXT, VISUAL]


def test_kinds_follow_from_ids_and_mask() -> None:
    batch = {"input_ids": torch.tensor([[96, 5, 96, 6]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    assert kinds_of(batch, IMAGE).tolist() == [[VISUAL, TEXT, VISUAL, PADDING]]
    assert kinds_of({"input_ids": torch.tensor([[5, 96]])}, IMAGE).tolist() == [[TEXT, VISUAL]]


def test_weights_of_noted_batches() -> None:
    of_kind = torch.tensor([[0.0, 1.0, 0.25], [0.0, 1.0, 0.0]])
    modalities = Modalities(IMAGE, of_kind)
    batches: list[Any] = [{"input_ids": torch.tensor([[96, 5]])}, {"input_ids": torch.tensor([[5, 6, 7]])}]
    assert list(modalities.noting(batches)) == batches
    assert [each.tolist() for each in modalities.at(0)] == [[[0.25, 1.0]], [[1.0, 1.0, 1.0]]]
    assert modalities.at(1)[0].tolist() == [[0.0, 1.0]]
    assert equal_weights(2).tolist() == [[0.0, 1.0, 1.0]] * 2


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_gradients_are_those_of_the_loss(name: str) -> None:
    """The loss of the model's own forward, and `autograd.grad` at the blocks' outputs."""
    arch = arch_for(name)
    found: tuple[Any, Any] = arch.tiny()
    model, batches = found[0].eval(), [batch | {"labels": _labels(batch)} for batch in found[1]]
    blocks = arch.find_blocks(model)
    visual = torch.tensor([model.config.image_token_id])
    weights = gradient_weights(model, blocks, batches, visual, "float32", ALONE)
    sums, counts = torch.zeros(len(blocks), 3), torch.zeros(3)
    for batch in batches:
        kinds = kinds_of(batch, visual).long()
        counts += kinds.flatten().bincount(minlength=3)
        for index, gradient in enumerate(_by_autograd(model, blocks, batch)):
            sums[index].index_add_(0, kinds.flatten(), gradient.abs().mean(-1).flatten())
    means = sums / counts
    assert weights[:, PADDING].tolist() == [0.0] * len(blocks)
    assert_close(weights[:, VISUAL], means[:, VISUAL] / means[:, TEXT], "model")
    assert 0 < weights[0, VISUAL] < 10
    models = [copy.deepcopy(model) for _ in range(2)]

    def work(ranks: Ranks) -> Tensor:
        mine, own = batches[ranks.rank :: 2], models[ranks.rank]
        return gradient_weights(own, arch.find_blocks(own), mine, visual, "float32", ranks)

    for each in in_threads(2, work):
        assert_close(each, weights, "model")


def _labels(batch: dict[str, Tensor]) -> Tensor:
    """The last four tokens are answers."""
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -4:] = batch["input_ids"][:, -4:]
    return labels.masked_fill(batch.get("attention_mask", torch.ones_like(labels)) == 0, -100)


def _by_autograd(model: Any, blocks: Any, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    model.requires_grad_(True)
    outputs: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda *call: outputs.append(call[2][0] if isinstance(call[2], tuple) else call[2]))
        for block in blocks
    ]
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
    for handle in handles:
        handle.remove()
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    return torch.autograd.grad(loss, outputs)
