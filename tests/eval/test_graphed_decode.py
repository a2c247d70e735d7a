"""A decode step of fixed shape: the tokens of transformers' `generate`, and on a GPU those of its graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TextStreamer

from eqat_eval.generation import generate_text
from eqat_eval.graphed_decode import decode, obstacle, uses_graph
from eqat_eval.inference import inference
from eqat_kernels import cpu_library
from eqat_mm.errors import ConfigError
from eqat_mm.train.llm_qat import LLMQATConfig, prepare
from llava_adapters import arch_for
from llava_adapters.tiny import tiny_causal_lm, tiny_llava, tiny_llava_next
from tests.checkpoint.files import assert_four_lines
from tests.quant.test_compile import packed_llama
from tests.tiny_model import tiny_llama

needs_compiler = pytest.mark.skipif(cpu_library.obstacle() is not None, reason=str(cpu_library.obstacle()))
GREEDY: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0}


def padded_prompts(rows: int = 3, device: str = "cpu") -> dict[str, Tensor]:
    """Prompts of 7, 4 and 1 tokens, padded on the left."""
    tokens, mask = torch.randint(2, 97, (rows, 7)), torch.ones(rows, 7, dtype=torch.long)
    for row in range(1, rows):
        mask[row, : 3 * row] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, 0).to(device), "attention_mask": mask.to(device)}


def generated(model: Any, inputs: dict[str, Tensor], count: int, **options: Any) -> Tensor:
    plain = {"top_k": 0} if options.get("do_sample") else {"do_sample": False}
    tokens: Tensor = model.generate(**inputs, max_new_tokens=count, **(GREEDY | plain | options))
    return tokens


def decoded(model: Any, inputs: dict[str, Tensor], count: int, *, graph: bool = False, **options: Any) -> Tensor:
    with inference(model):
        return decode(model, inputs, count, graph=graph, **(GREEDY | options))


recorded_or_not = pytest.mark.parametrize("graph", [False, pytest.param(True, marks=needs_compiler)])


@recorded_or_not
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_tokens_are_those_of_generate(attention: str, rows: int, graph: bool) -> None:
    model, inputs = tiny_llama(attn_implementation=attention).eval(), padded_prompts(rows)
    assert obstacle(model) is None
    assert torch.equal(decoded(model, inputs, 20, graph=graph), generated(model, inputs, 20))


@recorded_or_not
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packed_models_too(bits: int, graph: bool) -> None:
    model, inputs = packed_llama(bits), padded_prompts()
    assert torch.equal(decoded(model, inputs, 12, graph=graph), generated(model, inputs, 12))


@needs_compiler
@pytest.mark.parametrize("kind", ["qwen3", "granite", "olmo2", "smollm3"])
def test_a_recorded_step_of_other_models(kind: str) -> None:
    model, inputs = tiny_causal_lm(kind, pad_token_id=0)[0].eval(), padded_prompts()
    assert torch.equal(decoded(model, inputs, 12, graph=True), generated(model, inputs, 12))


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 1.7, "top_p": 0.8}], ids=str)
def test_sampled_tokens_are_those_of_generate(options: dict[str, float]) -> None:
    model, inputs = tiny_llama().eval(), padded_prompts()
    torch.manual_seed(5)
    wanted = generated(model, inputs, 12, do_sample=True, **options)
    torch.manual_seed(5)
    assert torch.equal(decoded(model, inputs, 12, **options), wanted)


def test_sequences_end_on_their_own() -> None:
    model, inputs = tiny_llama().eval(), padded_prompts()
    free = generated(model, inputs, 16)
    ends = [int(free[0, 9]), int(free[1, 12])]
    found = decoded(model, inputs, 16, eos_token_id=ends, pad_token_id=1)
    assert torch.equal(found, generated(model, inputs, 16, eos_token_id=ends, pad_token_id=1))
    assert (found[0, 10:] == 1).all()


def test_it_stops_where_all_have_ended() -> None:
    model, inputs = tiny_llama().eval(), padded_prompts(1)
    end = int(generated(model, inputs, 16)[0, 8])
    found = decoded(model, inputs, 16, eos_token_id=end)
    assert torch.equal(found, generated(model, inputs, 16, eos_token_id=end))
    assert found.shape[1] <= 9


@recorded_or_not
@pytest.mark.parametrize("make", [lambda: tiny_llava("llama"), lambda: tiny_llava_next("mistral")], ids=["1.5", "1.6"])
def test_images_are_in_the_prompt(make: Any, graph: bool) -> None:
    model, batches = make()
    model.eval()
    checked = 0
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if isinstance(value, Tensor) and name != "labels"}
        if "pixel_values" not in inputs or not inputs["attention_mask"][:, -1].all():
            continue
        assert torch.equal(decoded(model, inputs, 8, graph=graph), generated(model, inputs, 8))
        checked += 1
    assert checked


def test_a_streamer_is_given_the_tokens(tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = tiny_llama().eval(), padded_prompts(1)
    found = decoded(model, inputs, 8, streamer=TextStreamer(tokenizer, skip_prompt=True))  # type: ignore[no-untyped-call]
    assert capsys.readouterr().out.strip() == tokenizer.decode(found[0, 7:])


def test_what_has_no_fixed_shape_is_named() -> None:
    quantized = tiny_llama().eval()
    prepare(quantized, arch_for("llama"), LLMQATConfig(bits="8-16-4"))
    assert "KV cache" in str(obstacle(quantized))
    assert "sliding" in str(obstacle(tiny_causal_lm("mistral", sliding_window=4)[0]))
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "dynamic" in str(obstacle(tiny_llama(rope_parameters=rope)))


@needs_compiler
def test_a_cpu_records_in_float32() -> None:
    assert uses_graph(tiny_llama(), "auto")
    assert not uses_graph(tiny_llama(), False)
    assert not uses_graph(tiny_llama().bfloat16(), "auto")
    assert not uses_graph(tiny_causal_lm("mistral", sliding_window=4)[0], "auto")


def test_a_cpu_has_no_cuda_graphs() -> None:
    model = tiny_llama()
    with pytest.raises(ConfigError, match="the model is on cpu") as raised:
        uses_graph(model, True)
    assert_four_lines(raised.value)


def test_where_it_falls_back_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    class OnAGPU(LlamaForCausalLM):
        device = torch.device("cuda", 0)  # type: ignore[assignment]

    model = tiny_llama(kind=OnAGPU)
    assert uses_graph(model, "auto")
    model._can_compile_fullgraph = False  # type: ignore[assignment]
    assert not uses_graph(model, "auto")
    assert "without a CUDA graph: OnAGPU decides by values" in "".join(capsys.readouterr())
    with pytest.raises(ConfigError, match="decides by values"):
        uses_graph(model, True)


def test_a_graph_that_is_wanted_on_a_cpu_is_refused(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigError, match="cuda_graph"):
        generate_text(model, tokenizer, "w5 w17", 4, cuda_graph=True)


# ---- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 16])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_graph_writes_the_same_tokens(bits: int, dtype: torch.dtype, rows: int) -> None:
    model = tiny_llama().eval() if bits == 16 else packed_llama(bits)
    model.to("cuda", dtype)  # type: ignore[arg-type]
    inputs = padded_prompts(rows, "cuda")
    wanted = decoded(model, inputs, 24)
    assert torch.equal(decoded(model, inputs, 24, graph=True), wanted)
    if dtype is torch.float32:
        assert torch.equal(generated(model, inputs, 24), wanted)


@pytest.mark.gpu
def test_a_graph_samples_the_same_tokens() -> None:
    model, inputs = packed_llama(2).to("cuda", torch.bfloat16), padded_prompts(3, "cuda")
    found = []
    for graph in (False, True):
        torch.manual_seed(5)
        found.append(decoded(model, inputs, 24, graph=graph, temperature=1.2, top_p=0.9))
    assert torch.equal(*found)


@pytest.mark.gpu
def test_a_graph_after_an_image() -> None:
    model, batches = tiny_llava("llama")
    model.to("cuda").eval()
    batch = next(batch for batch in batches if "pixel_values" in batch and batch["attention_mask"][:, -1].all())
    inputs = {name: value.to("cuda") for name, value in batch.items() if name != "labels"}
    assert torch.equal(decoded(model, inputs, 12, graph=True), decoded(model, inputs, 12))


@pytest.mark.gpu
def test_generate_text_takes_the_graph(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.to("cuda")  # type: ignore[arg-type]
    texts = [generate_text(model, tokenizer, "w5 w17", 16, cuda_graph=graph) for graph in (True, False)]
    assert texts[0].token_ids == texts[1].token_ids
