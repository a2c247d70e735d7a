"""Generated text: determinism, options, chat templates and the judgement over prompts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eqat_eval.generation import generate_text, judge_generation, repetition
from eqat_mm.errors import ConfigError, DataError

PROMPT = "w5 w17 w42"
CHAT_TEMPLATE = "{% for message in messages %}w90 {{ message['content'] }} w91 {% endfor %}w92"


def argmax_continuation(model: LlamaForCausalLM, tokens_1T: Tensor, steps: int) -> tuple[int, ...]:
    """Continue greedily by running the whole sequence again for every token."""
    length = tokens_1T.shape[1]
    model.train(False)
    with torch.no_grad():
        for _ in range(steps):
            best_1 = model(input_ids=tokens_1T).logits[:, -1].argmax(-1)
            tokens_1T = torch.cat([tokens_1T, best_1[:, None]], dim=1)
    return tuple(tokens_1T[0, length:].tolist())


def test_greedy_takes_the_most_likely_token(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    made = generate_text(model, tokenizer, PROMPT, 12)
    expected = argmax_continuation(model, torch.tensor([[5, 17, 42]]), 12)
    expected = expected[: expected.index(1) + 1] if 1 in expected else expected
    assert made.token_ids == expected
    assert made.text == " ".join(f"w{token}" for token in expected if token != 1)
    assert made.tokens == len(expected)
    assert made.tokens_per_second == pytest.approx(made.tokens / made.seconds)
    assert generate_text(model, tokenizer, PROMPT, 12).token_ids == made.token_ids


def test_sampling_is_determined_by_its_seed(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    def sample(seed: int) -> tuple[int, ...]:
        return generate_text(model, tokenizer, PROMPT, 16, temperature=1.5, top_p=0.95, seed=seed).token_ids

    first = sample(3)
    torch.manual_seed(99)
    assert sample(3) == first
    assert sample(4) != first


def test_the_global_random_state_is_left_alone(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    before = torch.get_rng_state()
    generate_text(model, tokenizer, PROMPT, 4, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tiny_top_p_is_greedy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    sampled = generate_text(model, tokenizer, PROMPT, 12, temperature=1.0, top_p=1e-6, seed=8)
    assert sampled.token_ids == generate_text(model, tokenizer, PROMPT, 12).token_ids


def test_the_checkpoint_cannot_hide_repetition(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    plain = generate_text(model, tokenizer, PROMPT, 16).token_ids
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True, temperature=3.0, top_k=5, repetition_penalty=9.0, no_repeat_ngram_size=1
    )
    assert generate_text(model, tokenizer, PROMPT, 16).token_ids == plain


def test_generation_ends_at_the_models_own_end(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    third = generate_text(model, tokenizer, PROMPT, 12).token_ids[2]
    model.generation_config.eos_token_id = [96, third]
    made = generate_text(model, tokenizer, PROMPT, 12)
    assert made.token_ids[-1] == third
    assert made.tokens <= 3


def test_training_flag_comes_back(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.train()
    generate_text(model, tokenizer, PROMPT, 2)
    assert all(module.training for module in model.modules())


def test_streaming_prints_the_text(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    made = generate_text(model, tokenizer, PROMPT, 8, stream=True)
    assert capsys.readouterr().out.strip() == made.text
    generate_text(model, tokenizer, PROMPT, 8)
    assert capsys.readouterr().out == ""


def test_chat_uses_the_template(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    by_hand = generate_text(model, tokenizer, f"w90 {PROMPT} w91 w92", 8)
    assert generate_text(model, tokenizer, PROMPT, 8, chat=True).token_ids == by_hand.token_ids


def test_chat_without_a_template_is_refused(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="chat template"):
        generate_text(model, tokenizer, PROMPT, 8, chat=True)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_new_tokens": 0},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError):
        generate_text(model, tokenizer, PROMPT, **options)


def test_an_empty_prompt_is_refused(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="no token"):
        generate_text(model, tokenizer, "  ")


def test_judgement_is_the_mean_over_prompts(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [PROMPT, "w8 w9", "w60"]
    verdict = judge_generation(model, tokenizer, prompts, 20)
    scores = [repetition(generate_text(model, tokenizer, prompt, 20).token_ids) for prompt in prompts]
    repeated = [score.repeated_4grams for score in scores if score.repeated_4grams is not None]
    distinct = [score.distinct_2 for score in scores if score.distinct_2 is not None]
    assert verdict.repetition.repeated_4grams == pytest.approx(sum(repeated) / len(repeated))
    assert verdict.repetition.distinct_2 == pytest.approx(sum(distinct) / len(distinct))
    assert verdict.tokens == sum(sample.tokens for sample in verdict.samples) / 3


def test_judgement_without_long_texts_is_unknown(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    record = judge_generation(model, tokenizer, [PROMPT, "w60"], 1).as_dict()
    assert record["repeated_4grams"] is None
    assert record["distinct_2"] is None
    assert record["prompts"] == 2
    json.dumps(record, allow_nan=False)


def test_no_prompts_are_refused(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="prompts"):
        judge_generation(model, tokenizer, [])


def test_prompts_are_sampled_with_seeds_of_their_own(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    first, second = judge_generation(model, tokenizer, [PROMPT, PROMPT], 12, temperature=1.5).samples
    assert first.token_ids != second.token_ids
