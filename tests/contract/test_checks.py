"""Each check finds the adapter that is wrong in its way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eqat_mm.blocks.arch import Arch
from eqat_mm.contract import CHECKS, Case, NotHere, files, forward, outcomes, structure, training
from eqat_mm.contract.checks import Check, reason_of
from eqat_mm.data.image_text import batching
from eqat_mm.errors import AdapterError
from llava_adapters import arch_for
from llava_adapters.tiny import text_batches, tiny_causal_lm, tiny_llava

LLAMA, MIXTRAL, LLAVA = (arch_for(name) for name in ("llama", "mixtral", "llava"))
Q, K, V, OUT, GATE, UP, DOWN = LLAMA.linears


def granite() -> Arch:
    """Its blocks multiply what they add to the residual stream."""
    tiny = lambda: tiny_causal_lm("granite", residual_multiplier=0.5)  # noqa: E731
    return replace(LLAMA, name="granite", tiny=tiny)


def unpadded() -> Any:
    model, _ = tiny_causal_lm("llama")
    return model, text_batches()[:1]


def one_image() -> Any:
    """Every sample has the same image, and none has none."""
    model, batches = tiny_llava("llama")
    rows = batches[0]["input_ids"][1:2].expand(2, -1)
    return model, [{"input_ids": rows, "pixel_values": batches[0]["pixel_values"][:2]}, *text_batches()]


BROKEN: dict[str, tuple[Check, Arch, str]] = {
    "a linear is missing": (structure.parts, replace(LLAMA, stages=LLAMA.stages[:3]), "does not mention"),
    "a part is missing": (structure.parts, replace(LLAMA, full_precision=("model.norm",)), "in no declared part"),
    "a router is not kept": (structure.kinds, replace(MIXTRAL, kept=()), "mlp.gate: a matrix that is neither"),
    "kept is mistyped": (structure.kinds, replace(MIXTRAL, kept=("mlp.gate", "mlp.gat")), "mlp.gat in no block"),
    "tiny lacks a kind": (
        structure.kinds,
        replace(MIXTRAL, stages=(*MIXTRAL.stages, ("mlp.down_proj",))),
        "mlp.down_proj in no block of the tiny model",
    ),
    "no projector": (structure.projector, replace(LLAVA, projector=None), "projector None"),
    "no padding": (structure.padding, replace(LLAMA, tiny=unpadded), "0 of 1 batches padded"),
    "images alike": (structure.images, replace(LLAVA, tiny=one_image), "image tokens by sample"),
    "wrong order": (
        forward.stages,
        replace(LLAMA, stages=((GATE, UP), (Q, K, V), (OUT,), (DOWN,))),
        "before, or together with",
    ),
    "two inputs": (forward.stages, replace(LLAMA, stages=((Q, K, V, OUT), (GATE, UP), (DOWN,))), "different inputs"),
    "experts' order": (
        forward.stages,
        replace(MIXTRAL, stages=(*MIXTRAL.stages[:2], MIXTRAL.stages[3], MIXTRAL.stages[2])),
        "before, or together with",
    ),
    "a scaled sum": (forward.sums, granite(), "off by"),
    "a norm that the router reads": (
        forward.smoothing,
        replace(MIXTRAL, norms=(("post_attention_layernorm", "mlp.experts.*.gate_proj"),)),
        "logits that differ",
    ),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_broken_adapter_is_found(name: str, tmp_path: Path) -> None:
    check, arch, said = BROKEN[name]
    with pytest.raises(AdapterError) as caught:
        check(Case(arch, tmp_path))
    assert said in reason_of(caught.value)


def test_a_block_that_changes_its_own_parameters_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    plain = MixtralTopKRouter.forward

    def drifting(self: nn.Module, hidden: torch.Tensor) -> Any:
        with torch.no_grad():
            self.weight.add_(0.125)
        return plain(self, hidden)

    case = Case(MIXTRAL, tmp_path)
    monkeypatch.setattr(MixtralTopKRouter, "forward", drifting)
    with pytest.raises(AdapterError, match=r"block_sparse_moe\.gate\.weight"):
        training.block_ap(case)


def test_a_linear_without_gradients_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def detached(self: Any, x: torch.Tensor) -> torch.Tensor:
        down: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x).detach()) * self.up_proj(x))
        return down

    monkeypatch.setattr(LlamaMLP, "forward", detached)
    with pytest.raises(AdapterError, match=r"no finite gradient of model\.layers\.0\.mlp\.gate_proj"):
        training.e2e_qp(Case(LLAMA, tmp_path))


def test_a_router_that_is_not_kept_in_the_files_entry_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear that `ignore` does not name is read as a packed one, of which nothing is stored."""
    monkeypatch.setattr("eqat_mm.checkpoint.write.ignored_linears", lambda *_: [])
    with pytest.raises(Exception, match=r"lm_head|logits|size"):
        files.symmetric(Case(LLAMA, tmp_path))


def test_pixels_that_differ_in_training_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eqat_mm.contract import conversation

    collated = batching.Collator.__call__

    def brighter(self: batching.Collator, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = collated(self, samples)
        return batch | {name: batch[name] * 1.5 for name in batch.keys() & {"pixel_values"}}

    monkeypatch.setattr(batching.Collator, "__call__", brighter)
    with pytest.raises(AdapterError, match="for 1 images, alone"):
        conversation.inputs(Case(LLAVA, tmp_path))


def test_all_outcomes_are_told(tmp_path: Path) -> None:
    """One check that fails, whatever it raises, does not hide the others."""
    found = list(outcomes(replace(LLAMA, sums=((DOWN, "nowhere"),)), tmp_path))
    assert len(found) == len(CHECKS)
    assert all(isinstance(each.error, AdapterError) for each in found if "Experts" in each.says)
    assert [each.says for each in found if each.not_here is None and each.error is None]


def test_a_tiny_model_that_cannot_be_made_is_told_once(tmp_path: Path) -> None:
    (only,) = outcomes(replace(LLAMA, tiny=lambda: tiny_causal_lm("no-such-type")), tmp_path)
    assert "no-such-type" in reason_of(only.error or Exception())


def test_what_does_not_apply_is_no_failure(tmp_path: Path) -> None:
    with pytest.raises(NotHere, match="a language model"):
        structure.images(Case(LLAMA, tmp_path))
