"""Nothing of a checkpoint's generation_config.json decides what is written, but its end tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eqat_eval.decoding import decoding, generated
from eqat_eval.generation import generate_about_images, generate_text, judge_generation
from eqat_eval.graphed_decode import decode
from eqat_eval.inference import inference
from eqat_mm.errors import CheckpointError, ConfigError
from eqat_mm.train.llm_qat import LLMQATConfig, prepare
from llava_adapters import arch_for
from llava_adapters.tiny import tiny_llava
from tests.checkpoint.files import assert_four_lines
from tests.tiny_llava import tiny_processor
from tests.tiny_model import tiny_llama

PROMPT = "w5 w17 w42"
LEAKS: list[dict[str, Any]] = [
    {"stop_strings": ["w"]},
    {"cache_implementation": "static"},
    {"suppress_tokens": list(range(2, 90))},
    {"begin_suppress_tokens": list(range(2, 90))},
    {"bad_words_ids": [[token] for token in range(2, 90)]},
    {"sequence_bias": [[[token], -50.0] for token in range(2, 60)]},
    {"guidance_scale": 1.5},
    {"min_p": 0.5},
    {"num_return_sequences": 2},
    {"num_beams": 3},
    {"max_length": 4},
    {"min_new_tokens": 30},
    {"max_time": 0.0},
    {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1},
    {"do_sample": True, "temperature": 3.0, "top_k": 5, "top_p": 0.6},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"forced_eos_token_id": 7},
    {"exponential_decay_length_penalty": (1, 9.0)},
    {"prompt_lookup_num_tokens": 3},
    {"dola_layers": "high"},
    {"return_dict_in_generate": True, "output_scores": True},
    {"use_cache": False},
    {"renormalize_logits": True},
    {"prefill_chunk_size": 2},
    {"unknown_option": "of a later version"},
]
EACH_LEAK = pytest.mark.parametrize("leak", LEAKS, ids=lambda leak: "+".join(leak))


def configured(model: Any, leak: dict[str, Any]) -> None:
    """Give a model the settings, as `from_pretrained` does, which checks less than the class."""
    model.generation_config = GenerationConfig()
    for name, value in leak.items():
        setattr(model.generation_config, name, value)


@EACH_LEAK
def test_a_text_is_what_it_is_without(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, leak: dict[str, Any]
) -> None:
    written = [generate_text(model, tokenizer, PROMPT, 8).token_ids]
    sampled = [generate_text(model, tokenizer, PROMPT, 8, temperature=1.5).token_ids]
    judged = [judge_generation(model, tokenizer, [PROMPT], 8).samples[0].token_ids]
    configured(model, leak)
    before = model.generation_config.to_dict()
    written.append(generate_text(model, tokenizer, PROMPT, 8).token_ids)
    sampled.append(generate_text(model, tokenizer, PROMPT, 8, temperature=1.5).token_ids)
    judged.append(judge_generation(model, tokenizer, [PROMPT], 8).samples[0].token_ids)
    for first, second in (written, sampled, judged):
        assert first == second
    assert model.generation_config.to_dict() == before


@EACH_LEAK
def test_an_answer_about_an_image_is_what_it_is_without(leak: dict[str, Any]) -> None:
    model: Any = tiny_llava("llama")[0]
    processor, images = tiny_processor(), [Image.new("RGB", (16, 16), "red")]
    plain = generate_about_images(model, processor, "w5 <image> w6", images, 6)
    configured(model, leak)
    assert generate_about_images(model, processor, "w5 <image> w6", images, 6).token_ids == plain.token_ids


@pytest.mark.parametrize("leak", [{"cache_implementation": "static"}, {"cache_implementation": "quantized"}], ids=str)
def test_a_cache_of_integers_stays_one(tokenizer: PreTrainedTokenizerFast, leak: dict[str, Any]) -> None:
    model = tiny_llama().eval()
    prepare(model, arch_for("llama"), LLMQATConfig(bits="8-16-4"))
    plain = generate_text(model, tokenizer, PROMPT, 8).token_ids
    configured(model, leak)
    assert generate_text(model, tokenizer, PROMPT, 8).token_ids == plain


def test_a_configuration_that_names_settings_of_generation_is_no_matter(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = generate_text(model, tokenizer, PROMPT, 8).token_ids
    model.config.repetition_penalty = 5.0
    assert generate_text(model, tokenizer, PROMPT, 8).token_ids == plain


@pytest.mark.parametrize(
    ("own", "expected"),
    [(7, [7]), ([7, 8], [7, 8]), (None, [1]), ("</s>", [1]), (["</s>", 8], [8]), ([], [1])],
    ids=str,
)
def test_end_tokens_are_the_models_or_the_tokenizers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, own: Any, expected: list[int]
) -> None:
    model.generation_config.eos_token_id = own
    assert decoding(model, tokenizer, 4).eos_token_id == expected


@pytest.mark.parametrize(
    ("padding", "ends", "expected"), [(None, 7, 7), (0, 7, 0), (99_999, 7, 7), (99_999, 98, 0)], ids=str
)
def test_padding_has_a_row(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, padding: int | None, ends: int, expected: int
) -> None:
    if padding == 0:
        tokenizer.pad_token = "<unk>"
    elif padding is not None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})  # the 98th token of 97 rows
    model.generation_config.eos_token_id = ends
    assert decoding(model, tokenizer, 4).pad_token_id == expected


def test_options_out_of_range_are_refused(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    options: list[dict[str, Any]] = [{"temperature": math.inf}, {"top_p": math.nan}, {"num_beams": 0}]
    for option in options:
        with pytest.raises(ConfigError) as raised:
            decoding(model, tokenizer, 4, **option)
        assert_four_lines(raised.value)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_predictions_that_are_not_finite_end_it(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, temperature: float, value: float
) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[5, 6] = value
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.o_proj\.weight holds NaN or infinity") as raised:
        generate_text(model, tokenizer, PROMPT, 4, temperature=temperature)
    assert_four_lines(raised.value)
    inputs = {"input_ids": torch.tensor([[5, 17]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    with inference(model), pytest.raises(CheckpointError, match="o_proj"):
        decode(model, inputs, 4, graph=False)


def test_predictions_that_overflow_later_end_it(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """The weights are finite; the second token's prediction is not."""
    settings = decoding(model, tokenizer, 4)
    model.lm_head.register_forward_hook(lambda _, inputs, logits: logits / (inputs[0].shape[1] > 1))
    inputs = {"input_ids": torch.tensor([[5, 17, 42]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with inference(model), pytest.raises(CheckpointError, match="all weights are finite") as raised:
        generated(model, inputs, settings)
    assert_four_lines(raised.value)
