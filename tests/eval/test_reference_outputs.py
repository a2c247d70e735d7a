"""The recorded reference: cached head inputs, the fallback to logits, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from eqat_eval import reference as reference_module
from eqat_eval.perplexity import ReferenceOutputs, evaluate_perplexity
from eqat_mm.errors import CheckpointError, ConfigError
from tests.checkpoint.files import assert_four_lines
from tests.tiny_model import tiny_llama
from tests.tolerances import assert_close

CPU = torch.device("cpu")


class ScaledLlama(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Halves its logits after the head, as models with a logit scale do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output


class SoftCappedLlama(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Bends its logits after the head, as Gemma-2 does."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 5.0 * torch.tanh(output.logits / 5.0)
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_inputs_rebuild_the_logits(model: LlamaForCausalLM, windows_NT: Tensor, dtype: torch.dtype) -> None:
    nn.Module.to(model, dtype)
    reference = ReferenceOutputs.record(model, windows_NT, batch_size=2)
    with torch.no_grad():
        logits_TV = model(input_ids=windows_NT[3:4]).logits[0]
    assert reference.cached.shape == (5, 13, 64)
    assert reference.cached.dtype is dtype
    assert_close(reference.logits(3, 2, 9, CPU), logits_TV[2:9], "model")


@pytest.mark.parametrize("kind", [ScaledLlama, SoftCappedLlama])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_changed_after_the_head_are_kept_themselves(
    kind: type[LlamaForCausalLM],
    windows_NT: Tensor,
    dtype: torch.dtype,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_llama(seed=0, kind=kind)
    nn.Module.to(model, dtype)
    reference = ReferenceOutputs.record(model, windows_NT, batch_size=2)
    assert reference.head is None
    assert reference.cached.shape == (5, 13, 97)
    assert "0.0 GiB" in capsys.readouterr().out
    assert reference.cached.dtype is torch.float16
    result = evaluate_perplexity(model, windows_NT, reference=reference)
    assert result.kl == pytest.approx(0.0, abs=1e-5)


def test_both_kinds_of_cache_agree(
    model: LlamaForCausalLM,
    other_model: LlamaForCausalLM,
    windows_NT: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_head = ReferenceOutputs.record(model, windows_NT)
    monkeypatch.setattr(reference_module, "_explains", lambda *_: False)
    by_logits = ReferenceOutputs.record(model, windows_NT)
    assert by_head.head is not None
    assert by_logits.head is None
    exact = evaluate_perplexity(other_model, windows_NT, reference=by_head)
    rounded = evaluate_perplexity(other_model, windows_NT, reference=by_logits)
    assert rounded.perplexity == exact.perplexity
    assert rounded.kl == pytest.approx(exact.kl, rel=1e-3)
    assert rounded.top1_agreement == exact.top1_agreement


def test_the_reference_survives_changes_of_its_model(model: LlamaForCausalLM, windows_NT: Tensor) -> None:
    reference = ReferenceOutputs.record(model, windows_NT)
    before = reference.logits(0, 0, 13, CPU)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(reference.logits(0, 0, 13, CPU), before)
    windows_NT.zero_()
    assert not torch.equal(reference.windows_NT, windows_NT)


def test_recording_leaves_no_trace_in_the_model(model: LlamaForCausalLM, windows_NT: Tensor) -> None:
    model.train()
    ReferenceOutputs.record(model, windows_NT)
    assert model.training
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("batch_size", [1, 2])
def test_predictions_that_are_not_finite_are_refused(
    model: LlamaForCausalLM, windows_NT: Tensor, batch_size: int
) -> None:
    with torch.no_grad():
        model.model.embed_tokens.weight[windows_NT[4, 7]] = torch.nan
    with pytest.raises(CheckpointError, match=r"the reference's .* model\.embed_tokens\.weight holds NaN") as raised:
        ReferenceOutputs.record(model, windows_NT, batch_size)
    assert_four_lines(raised.value)


def test_other_windows_are_refused(model: LlamaForCausalLM, windows_NT: Tensor) -> None:
    reference = ReferenceOutputs.record(model, windows_NT)
    with pytest.raises(ConfigError, match="other tokens"):
        evaluate_perplexity(model, windows_NT.flip(0), reference=reference)
    with pytest.raises(ConfigError, match="other tokens"):
        evaluate_perplexity(model, windows_NT[:2], reference=reference)


def test_another_vocabulary_is_refused(
    model: LlamaForCausalLM, other_model: LlamaForCausalLM, windows_NT: Tensor
) -> None:
    reference = ReferenceOutputs.record(model, windows_NT)
    other_model.resize_token_embeddings(128, mean_resizing=False)
    with pytest.raises(ConfigError, match="97 logits per token, the model has 128"):
        evaluate_perplexity(other_model, windows_NT, reference=reference)
