"""The parts of `gpu_day` on whole models of random packed weights, and the starting grids of one block."""

from __future__ import annotations

from typing import Any

import memory_e2e
import torch
from gpu_day_kernels import BLOCK_OF_7B
from gpu_sizes import GROUP, Sizes
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from eqat_eval.graphed_decode import decode
from eqat_mm.quant.init import Init, initial_grid
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.e2e_qp import E2EQPConfig, trainable_groups
from eqat_mm.train.losses import cross_entropy


def starts(sizes: Sizes) -> dict[str, Any]:
    """The starting grids of the linears of a 7B's block, and of the largest layer of a 70B: seconds and peak memory."""
    found: dict[str, Any] = {}
    shapes = {"7B block": sizes.layers(*BLOCK_OF_7B), "8192x28672": sizes.layers((8192, 28672))}
    for name, layers in shapes.items():
        drawn = [_layer_and_statistics(sizes, *layer) for layer in layers]
        for init in ("minmax", "search", "gptq", "refined"):
            _start(sizes, drawn[:1], init)
            sizes.empty_cache()
            found[f"{name}, {init}"] = {
                "s": sizes.wall_s(lambda init=init, drawn=drawn: _start(sizes, drawn, init)),  # type: ignore[misc]
                "peak GB": sizes.peak_gb(),
            }
    return found


def _layer_and_statistics(sizes: Sizes, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(sizes.of(4096, 128), inputs, device=sizes.device)
    x += x.roll(1, 1)  # neighbours go together
    return torch.randn(outputs, inputs, device=sizes.device), x.T @ x


def _start(sizes: Sizes, layers: list[tuple[torch.Tensor, torch.Tensor]], init: Init) -> None:
    for weight, hessian in layers:
        initial_grid(weight, QuantSpec(2, GROUP), layer="linear", init=init, hessian=hessian)


def whole_packed(sizes: Sizes, name: str, bits: int) -> LlamaForCausalLM:
    """Return a Llama-2 of random codes on the device, without a dense copy of it anywhere."""
    with torch.device("meta"):
        model = memory_e2e.packed_model(_config(sizes, name), QuantSpec(bits, GROUP))
    model.to_empty(device=sizes.device)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            for words in module.buffers():
                words.random_(-(2**31), 2**31 - 1) if words.dtype == torch.int32 else words.zero_()
            module.weight_scale.data.uniform_(0.01, 0.02)
        elif isinstance(module, (nn.Embedding, nn.Linear)):
            module.weight.data.normal_(std=0.02)
        elif hasattr(module, "variance_epsilon"):
            module.weight.data.fill_(1)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(sizes.device)
    return model


def _config(sizes: Sizes, name: str) -> LlamaConfig:
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape = sizes.of(memory_e2e.MODELS[name], tiny)
    return LlamaConfig(vocab_size=sizes.of(32_000, 128), max_position_embeddings=4096, **shape)


def tuned(sizes: Sizes) -> dict[str, Any]:
    """Steps of E2E-QP on whole models, 2 x 4096 tokens, 2 bits: seconds, and peak memory beside what was computed."""
    found: dict[str, Any] = {}
    for name in ("7b", "13b", "70b"):
        sizes.empty_cache()
        found[name] = _tuned(sizes, name)
    return found


def _tuned(sizes: Sizes, name: str) -> dict[str, Any]:
    model = whole_packed(sizes, name, 2)
    groups = trainable_groups(model, None, E2EQPConfig())
    optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=True)
    ids = torch.randint(5, 100, (2, sizes.of(4096, 16)), device=sizes.device)
    columns = torch.arange(ids.shape[1] - 1, device=sizes.device)
    losses: list[float] = []

    def step() -> None:
        with torch.autocast(sizes.device.type, dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=columns).logits
        loss = cross_entropy(logits, ids[:, 1:], ids[:, 1:].numel())
        del logits
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))

    times = [sizes.wall_s(step) for _ in range(3)]
    return {"s": times, "tokens/s": ids.numel() / min(times), "peak GB": sizes.peak_gb(), "losses": losses}


def answers(sizes: Sizes) -> dict[str, Any]:
    """Tokens a second of whole models, one sequence: dense and packed, from Python and from a CUDA graph."""
    new = sizes.of(64, 4)
    inputs = {"input_ids": torch.randint(5, 100, (1, 16), device=sizes.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    found: dict[str, Any] = {"7b, dense": _tokens_per_second(sizes, _dense(sizes, "7b"), inputs, new)}
    for name, bits in (("7b", 2), ("7b", 3), ("7b", 4), ("70b", 2)):
        sizes.empty_cache()
        model = whole_packed(sizes, name, bits).requires_grad_(False)
        model.activation_checkpointing_disable()
        found[f"{name}, {bits} bits"] = _tokens_per_second(sizes, model, inputs, new) | {"peak GB": sizes.peak_gb()}
        del model
    return found


def _dense(sizes: Sizes, name: str) -> nn.Module:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with sizes.device:
            return LlamaForCausalLM(_config(sizes, name)).requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def _tokens_per_second(sizes: Sizes, model: Any, inputs: dict[str, torch.Tensor], new: int) -> dict[str, Any]:
    model.eval()
    lengths = {"max_new_tokens": new, "min_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
    answers: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def eager() -> None:
        answers["eager"] = model.generate(**inputs, do_sample=False, **lengths)

    @torch.inference_mode()
    def graphed() -> None:
        answers["graph"] = decode(model, inputs, new, graph=not sizes.dry)

    eager()
    graphed()
    rates: dict[str, Any] = {"eager": new / sizes.wall_s(eager), "graph": new / sizes.wall_s(graphed)}
    return rates | {"same tokens": torch.equal(answers["eager"], answers["graph"])}


PARTS = {
    "starts": (40.0, starts),
    "tuned": (60.0, tuned),
    "answers": (75.0, answers),
}
