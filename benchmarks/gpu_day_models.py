"""The parts of `gpu_day` that train and generate: blocks of a 7B, random weights."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, Literal
from unittest import mock

import torch
import transformers
from gpu_sizes import GROUP, Sizes
from torch import nn

from eqat_eval.graphed_decode import decode
from eqat_mm.blocks.arch import set_submodule
from eqat_mm.blocks.source import OpenModel, open_model
from eqat_mm.blocks.walker import BlockWalker, capture_front
from eqat_mm.quant.convert import to_fake
from eqat_mm.quant.init import initial_grid
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.block_ap import BlockAPConfig, run_block_ap
from eqat_mm.train.fit import FitConfig, trainable_parameters
from eqat_mm.train.losses import block_loss, cross_entropy
from llava_adapters import arch_of_folder

SPEC = QuantSpec(2, GROUP)
TOKENS, BATCH = 2048, 2


@cache
def _folder(sizes: Sizes, blocks: int) -> Path:
    """Save a Llama as wide as a 7B with a few blocks."""
    folder = Path(mkdtemp())
    config = transformers.LlamaConfig(
        hidden_size=sizes.of(4096, 64),
        intermediate_size=sizes.of(11008, 128),
        num_attention_heads=sizes.of(32, 4),
        num_key_value_heads=sizes.of(32, 4),
        num_hidden_layers=blocks,
        vocab_size=sizes.of(32000, 128),
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with sizes.device:
            model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    return folder


def _opened(sizes: Sizes, blocks: int = 2) -> OpenModel:
    folder = _folder(sizes, blocks)
    return open_model(folder, arch_of_folder(folder, None))


def _samples(sizes: Sizes, count: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(5, 100, (1, sizes.of(TOKENS, 16)))} for _ in range(count)]


def block_ap(sizes: Sizes) -> dict[str, Any]:
    """Two blocks from beginning to end, 2 x 2048 tokens a step, streams as they are by default on the device."""
    config = BlockAPConfig(quant=SPEC, fit=FitConfig(epochs=1, validation_samples=8), precision=_precision(sizes))
    sizes.empty_cache()
    with TemporaryDirectory() as folder:
        seconds = sizes.wall_s(
            lambda: run_block_ap(
                _opened(sizes),
                _samples(sizes, sizes.of(136, 12)),
                config,
                Path(folder),
                device=sizes.device,
                source="random",
                provenance={"config": {}},
            )
        )
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    kept = ("seconds", "tokens_per_second", "loss_before", "loss_after")
    blocks = [{name: line[name] for name in kept} for line in lines]
    return {"wall s": seconds, "peak GB": sizes.peak_gb(), "blocks": blocks}


def block_step(sizes: Sizes) -> dict[str, Any]:
    """One training step taken apart, its data on the device: milliseconds."""
    walker = BlockWalker(
        _opened(sizes),
        capture_front(_opened(sizes), _samples(sizes, 4), torch.float32),
        device=sizes.device,
        precision=_precision(sizes),
        stream_dtype=torch.bfloat16,
    )
    step = next(walker.walk())
    for path, linear in walker.opened.arch.named_linears(step.block):
        grid = initial_grid(linear.weight, SPEC, layer=path, init="minmax")
        set_submodule(step.block, path, to_fake(linear, grid, SPEC))
    optimizer = torch.optim.AdamW(trainable_parameters(step.block, FitConfig()), fused=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    hidden, target = (stream.gather([0, 1]).to(sizes.device).float() for stream in (step.quantized, step.fp))
    call, loss = step.call([0, 1]), [torch.zeros(())]

    def forward() -> None:
        loss[0] = block_loss(walker.run(step.block, call, hidden), target)

    works = {
        "forward": forward,
        "backward": lambda: loss[0].backward(),
        "clip": lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0),
        "AdamW": optimizer.step,
        "gradients freed": optimizer.zero_grad,
    }
    times = [{name: sizes.wall_s(work) * 1e3 for name, work in works.items()} for _ in range(8)]
    return {name: median(time[name] for time in times[2:]) for name in works}


def _precision(sizes: Sizes) -> Literal["bfloat16", "float32"]:
    return "float32" if sizes.dry else "bfloat16"


def _packed(sizes: Sizes, blocks: int, bits: int) -> nn.Module:
    """Return the model with random codes, unquantized parts in bfloat16."""
    model = transformers.AutoModelForCausalLM.from_pretrained(_folder(sizes, blocks), dtype=torch.bfloat16)
    model.to(sizes.device).requires_grad_(False)
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            packed = PackedLinear(module.in_features, module.out_features, QuantSpec(bits, GROUP)).to(sizes.device)
            packed.weight_packed.random_(-(2**31), 2**31 - 1)
            packed.weight_scale.data.fill_(0.01)
            set_submodule(model.model.layers, name, packed)
    return model


def e2e_step(sizes: Sizes) -> dict[str, Any]:
    """A step of E2E-QP on 2 x 4096 tokens, four blocks, activations recomputed: seconds and peak memory."""
    model = _packed(sizes, 4, 2).train()
    scales = [module.weight_scale.requires_grad_() for module in model.modules() if isinstance(module, PackedLinear)]
    model.activation_checkpointing_enable()
    ids = torch.randint(5, 100, (2, sizes.of(4096, 16)), device=sizes.device)

    def step() -> None:
        with torch.autocast(sizes.device.type, dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        cross_entropy(logits[:, :-1], ids[:, 1:]).backward()
        for scale in scales:
            scale.grad = None

    sizes.empty_cache()
    times = [sizes.wall_s(step) for _ in range(4)]
    return {"s": times, "tokens/s": ids.numel() / min(times), "peak GB": sizes.peak_gb()}


def generate(sizes: Sizes) -> dict[str, Any]:
    """Tokens a second with eight blocks, one sequence: transformers' `generate`, and decode steps from a CUDA graph."""
    blocks, new = sizes.of(8, 2), sizes.of(64, 4)
    inputs = {"input_ids": torch.randint(5, 100, (1, 16), device=sizes.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    dense = transformers.AutoModelForCausalLM.from_pretrained(_folder(sizes, blocks), dtype=torch.bfloat16)
    found = {"dense": _tokens_per_second(sizes, dense.to(sizes.device), inputs, new)}
    del dense
    for bits in (2, 3, 4):
        found[f"{bits} bits"] = _tokens_per_second(sizes, _packed(sizes, blocks, bits), inputs, new)
    return found


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


def deepspeed_dtype(sizes: Sizes) -> dict[str, Any]:
    """Which dtype a product sees inside an engine of DeepSpeed under autocast, without and with its own setting."""
    import deepspeed

    from eqat_kernels.tensors import product_dtype

    seen: list[str] = []

    class Probe(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(str(product_dtype(x)))
            return super().forward(x)

    adamw = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}, "optimizer": adamw}
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    with mock.patch.dict(os.environ, alone):  # not for the parts behind this one
        for own in ({}, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}):
            engine, *_ = deepspeed.initialize(model=Probe(64, 64).to(sizes.device), config=config | own)
            with torch.autocast(sizes.device.type, dtype=torch.bfloat16):
                engine(torch.randn(2, 64, device=sizes.device))
    torch.distributed.destroy_process_group()
    return {"without": seen[0], "with torch_autocast": seen[1]}


PARTS = {
    "block-ap": (45.0, block_ap),
    "block-step": (12.0, block_step),
    "e2e-step": (20.0, e2e_step),
    "generate": (30.0, generate),
    "deepspeed": (10.0, deepspeed_dtype),
}
