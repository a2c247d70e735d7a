"""Perplexity, KL and agreement against the textbook computation in float64."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaForCausalLM

from eqat_eval.perplexity import PerplexityResult, ReferenceOutputs, evaluate_perplexity
from eqat_mm.errors import CheckpointError, ConfigError, DataError
from eqat_mm.runtime.ranks import Ranks
from tests.checkpoint.files import assert_four_lines
from tests.thread_ranks import in_threads
from tests.tolerances import TOLERANCES

RELATIVE = TOLERANCES["model"][torch.float32]


class ConstantLogits(nn.Module):
    """Stands in for a causal LM whose logits are the same everywhere."""

    def __init__(self, logits_V: Tensor) -> None:
        super().__init__()
        self.logits_V = nn.Parameter(logits_V)
        self.device = logits_V.device

    def get_input_embeddings(self) -> None:
        return None

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits_V.expand(*input_ids.shape, -1))


def log_probabilities(model: LlamaForCausalLM, windows_NT: Tensor) -> Tensor:
    """Return the log-probabilities [n, T - 1, V] of all predicted positions, in float64."""
    model.train(False)
    with torch.no_grad():
        logits_NTV: Tensor = model(input_ids=windows_NT).logits
    return logits_NTV[:, :-1].double().log_softmax(-1)


def test_perplexity_is_the_naive_one(model: LlamaForCausalLM, windows_NT: Tensor) -> None:
    result = evaluate_perplexity(model, windows_NT, batch_size=2, chunk_rows=5)
    likelihoods = log_probabilities(model, windows_NT).gather(-1, windows_NT[:, 1:, None])
    assert result.perplexity == pytest.approx(math.exp(-likelihoods.mean().item()), rel=RELATIVE)
    assert result.tokens == 5 * 12
    assert result.seconds > 0
    assert result.kl is None
    assert result.top1_agreement is None


def test_a_model_is_at_no_distance_from_itself(model: LlamaForCausalLM, windows_NT: Tensor) -> None:
    reference = ReferenceOutputs.record(model, windows_NT, batch_size=3)
    result = evaluate_perplexity(model, windows_NT, reference=reference, batch_size=2, chunk_rows=4)
    assert reference.head is not None
    assert result.kl == pytest.approx(0.0, abs=1e-9)
    assert result.top1_agreement == 1.0
    assert result.flips == 0.0


def test_kl_and_agreement_are_the_naive_ones(
    model: LlamaForCausalLM, other_model: LlamaForCausalLM, windows_NT: Tensor
) -> None:
    reference = ReferenceOutputs.record(model, windows_NT)
    result = evaluate_perplexity(other_model, windows_NT, reference=reference, batch_size=2, chunk_rows=5)
    log_q, log_p = log_probabilities(model, windows_NT), log_probabilities(other_model, windows_NT)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean().item()
    agreement = (log_q.argmax(-1) == log_p.argmax(-1)).double().mean().item()
    assert result.kl == pytest.approx(kl, rel=RELATIVE)
    assert kl > 0.1
    assert result.top1_agreement == agreement
    assert agreement < 1.0
    right = [said.argmax(-1) == windows_NT[:, 1:] for said in (log_q, log_p)]
    assert result.flips == (right[0] != right[1]).double().mean().item()
    assert result.flips > 0


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
@pytest.mark.parametrize("chunk_rows", [1, 5, 12, 512])
def test_batches_and_chunks_do_not_change_the_result(
    model: LlamaForCausalLM,
    other_model: LlamaForCausalLM,
    windows_NT: Tensor,
    batch_size: int,
    chunk_rows: int,
) -> None:
    reference = ReferenceOutputs.record(model, windows_NT, batch_size=batch_size)
    whole = evaluate_perplexity(other_model, windows_NT, reference=reference, batch_size=5, chunk_rows=12)
    pieces = evaluate_perplexity(
        other_model, windows_NT, reference=reference, batch_size=batch_size, chunk_rows=chunk_rows
    )
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=RELATIVE)
    assert pieces.kl == pytest.approx(whole.kl, rel=RELATIVE)
    assert pieces.top1_agreement == whole.top1_agreement


def test_float32_is_held_for_one_chunk_only(
    model: LlamaForCausalLM, windows_NT: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    softmax = Tensor.log_softmax

    def spy(logits_RV: Tensor, dim: int) -> Tensor:
        seen.append(len(logits_RV))
        return softmax(logits_RV, dim)

    monkeypatch.setattr(Tensor, "log_softmax", spy)
    evaluate_perplexity(model, windows_NT, batch_size=5, chunk_rows=5)
    assert seen == [5, 5, 2] * 5


@pytest.mark.parametrize("compared", [False, True])
def test_one_batch_of_logits_is_held_at_a_time(
    model: LlamaForCausalLM, windows_NT: Tensor, monkeypatch: pytest.MonkeyPatch, compared: bool
) -> None:
    made: list[Any] = []
    forward = model.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        assert all(storage.expired() for storage in made)
        output = forward(*args, **kwargs)
        made.append(StorageWeakRef(output.logits.untyped_storage()))  # type: ignore[no-untyped-call]
        return output

    monkeypatch.setattr(model, "forward", spy)
    reference = ReferenceOutputs.record(model, windows_NT) if compared else None
    evaluate_perplexity(model, windows_NT, reference=reference)
    assert len(made) == (11 if compared else 5)


def test_training_flags_come_back_module_by_module(model: LlamaForCausalLM, windows_NT: Tensor) -> None:
    model.train()
    model.model.embed_tokens.eval()
    before = [module.training for module in model.modules()]
    evaluate_perplexity(model, windows_NT)
    assert [module.training for module in model.modules()] == before
    windows_NT[0, 0] = -1
    with pytest.raises(DataError, match="token ids from -1"):
        evaluate_perplexity(model, windows_NT)
    assert [module.training for module in model.modules()] == before


def test_the_model_can_still_be_trained(model: LlamaForCausalLM, windows_NT: Tensor) -> None:
    evaluate_perplexity(model, windows_NT)
    model(input_ids=windows_NT, labels=windows_NT).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_an_infinite_loss_is_refused(windows_NT: Tensor) -> None:
    logits_V = torch.zeros(97)
    logits_V[windows_NT[2, 1]] = -torch.inf
    window = next(row for row, tokens in enumerate(windows_NT) if windows_NT[2, 1] in tokens[1:])
    with pytest.raises(
        CheckpointError, match=f"loss of window {window} is inf; logits_V holds NaN or infinity"
    ) as raised:
        evaluate_perplexity(ConstantLogits(logits_V), windows_NT)  # type: ignore[arg-type]
    assert_four_lines(raised.value)


def test_a_loss_too_large_for_exp_is_refused(windows_NT: Tensor) -> None:
    logits_V = torch.zeros(97)
    logits_V[windows_NT[0, 1]] = -1e6
    with pytest.raises(CheckpointError, match="nats a token") as raised:
        evaluate_perplexity(ConstantLogits(logits_V), windows_NT)  # type: ignore[arg-type]
    assert_four_lines(raised.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("compared", [False, True])
def test_a_weight_that_is_not_finite_is_named(
    model: LlamaForCausalLM, other_model: LlamaForCausalLM, windows_NT: Tensor, value: float, compared: bool
) -> None:
    reference = ReferenceOutputs.record(model, windows_NT) if compared else None
    with torch.no_grad():
        other_model.model.layers[1].mlp.down_proj.weight[3, 4] = value
    with pytest.raises(CheckpointError, match=r"window 0 is nan; model\.layers\.1\.mlp\.down_proj\.weight") as raised:
        evaluate_perplexity(other_model, windows_NT, reference=reference, batch_size=2)
    assert_four_lines(raised.value)


def test_the_first_spoilt_window_is_named(model: LlamaForCausalLM, windows_NT: Tensor) -> None:
    with torch.no_grad():
        model.model.embed_tokens.weight[windows_NT[3, 0]] = math.nan
    first = next(row for row, tokens in enumerate(windows_NT) if windows_NT[3, 0] in tokens)
    with pytest.raises(CheckpointError, match=f"loss of window {first} is nan"):
        evaluate_perplexity(model, windows_NT, batch_size=2)


def test_an_infinite_kl_is_refused(windows_NT: Tensor) -> None:
    """The model rules out a token that no text has, and that the reference holds possible."""
    unused = next(token for token in range(97) if token not in windows_NT)
    logits_V = torch.zeros(97)
    reference = ReferenceOutputs.record(ConstantLogits(logits_V), windows_NT)  # type: ignore[arg-type]
    logits_V = logits_V.clone()
    logits_V[unused] = -torch.inf
    with pytest.raises(CheckpointError, match="KL of window 0 is inf"):
        evaluate_perplexity(ConstantLogits(logits_V), windows_NT, reference=reference)  # type: ignore[arg-type]


def test_masked_vocabulary_does_not_spoil_the_kl() -> None:
    windows_NT = torch.zeros(2, 4, dtype=torch.int64)
    masked: Any = ConstantLogits(torch.tensor([1.0, 2.0, -torch.inf]))
    result = evaluate_perplexity(masked, windows_NT, reference=ReferenceOutputs.record(masked, windows_NT))
    assert result.kl == 0.0
    assert result.top1_agreement == 1.0


@pytest.mark.parametrize(
    "windows",
    [
        torch.zeros(5, dtype=torch.int64),
        torch.zeros(5, 1, dtype=torch.int64),
        torch.zeros(0, 8, dtype=torch.int64),
        torch.zeros(2, 8, dtype=torch.int32),
        torch.full((2, 8), 97),
    ],
    ids=["one axis", "one token", "no window", "int32", "foreign id"],
)
def test_unusable_windows_are_refused(model: LlamaForCausalLM, windows: Tensor) -> None:
    with pytest.raises(DataError, match="evaluation windows"):
        evaluate_perplexity(model, windows)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_divide_the_windows_and_find_what_one_process_does(
    model: LlamaForCausalLM, other_model: LlamaForCausalLM, windows_NT: Tensor, world: int
) -> None:
    alone = evaluate_perplexity(model, windows_NT, reference=ReferenceOutputs.record(other_model, windows_NT))

    def measure(ranks: Ranks) -> PerplexityResult:
        own = windows_NT[list(ranks.share(len(windows_NT)))]
        mine, other = copy.deepcopy(model), copy.deepcopy(other_model)  # threads share what is not copied
        return evaluate_perplexity(mine, own, reference=ReferenceOutputs.record(other, own), ranks=ranks)

    for found in in_threads(world, measure):
        assert replace(found, seconds=0) == replace(alone, seconds=0)


@pytest.mark.parametrize("option", ["batch_size", "chunk_rows"])
def test_counts_below_one_are_refused(model: LlamaForCausalLM, windows_NT: Tensor, option: str) -> None:
    options: dict[str, Any] = {option: 0}
    with pytest.raises(ConfigError, match=option):
        evaluate_perplexity(model, windows_NT, **options)


def test_result_is_a_dictionary_on_demand(model: LlamaForCausalLM, windows_NT: Tensor) -> None:
    record = evaluate_perplexity(model, windows_NT).as_dict()
    assert list(record) == ["perplexity", "tokens", "kl", "top1_agreement", "flips", "seconds"]
