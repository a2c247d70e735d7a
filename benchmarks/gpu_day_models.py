"""The parts of `gpu_day` that train blocks of a 7B, random weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, Literal
from unittest import mock

import torch
import transformers
from gpu_sizes import GROUP, Sizes
from memory_e2e import MODELS
from torch import nn

from eqat_mm.blocks.arch import set_submodule
from eqat_mm.blocks.source import OpenModel, open_model
from eqat_mm.blocks.walker import BlockWalker, capture_front
from eqat_mm.quant.convert import to_fake
from eqat_mm.quant.init import initial_grid
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.block_ap import BlockAPConfig, run_block_ap
from eqat_mm.train.fit import FitConfig, trainable_parameters
from eqat_mm.train.losses import block_loss
from llava_adapters import arch_of_folder

SPEC = QuantSpec(2, GROUP)
TOKENS, BATCH = 2048, 2


@cache
def _folder(sizes: Sizes, name: str, blocks: int) -> Path:
    """Save a Llama as wide as one of `memory_e2e.MODELS`, with a few blocks."""
    folder = Path(mkdtemp())
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        **sizes.of(MODELS[name], tiny) | {"num_hidden_layers": blocks},
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


def _opened(sizes: Sizes, name: str = "7b", blocks: int = 2) -> OpenModel:
    folder = _folder(sizes, name, blocks)
    return open_model(folder, arch_of_folder(folder, None))


def _samples(sizes: Sizes, count: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(5, 100, (1, sizes.of(TOKENS, 16)))} for _ in range(count)]


def block_ap(sizes: Sizes) -> dict[str, Any]:
    """Two blocks of a 7B from beginning to end, 2 x 2048 tokens a step, streams as they are by default."""
    return _fitted(sizes, "7b", 2, sizes.of(136, 12))


def wide(sizes: Sizes) -> dict[str, Any]:
    """The same for one block of a 13B and of a 70B: seconds, and peak memory."""
    return {name: _fitted(sizes, name, 1, sizes.of(40, 12)) for name in ("13b", "70b")}


def _fitted(sizes: Sizes, name: str, blocks: int, samples: int) -> dict[str, Any]:
    config = BlockAPConfig(quant=SPEC, fit=FitConfig(epochs=1, validation_samples=8), precision=_precision(sizes))
    sizes.empty_cache()
    with TemporaryDirectory() as folder:
        seconds = sizes.wall_s(
            lambda: run_block_ap(
                _opened(sizes, name, blocks),
                _samples(sizes, samples),
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
    forward, block = fake_block(sizes)
    optimizer = torch.optim.AdamW(trainable_parameters(block, FitConfig()), fused=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    loss = [torch.zeros(())]

    def forwards() -> None:
        loss[0] = forward(block)

    works = {
        "forward": forwards,
        "backward": lambda: loss[0].backward(),
        "clip": lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0),
        "AdamW": optimizer.step,
        "gradients freed": optimizer.zero_grad,
    }
    times = [{name: sizes.wall_s(work) * 1e3 for name, work in works.items()} for _ in range(8)]
    return {name: median(time[name] for time in times[2:]) for name in works}


def fake_block(sizes: Sizes) -> tuple[Callable[[nn.Module], torch.Tensor], nn.Module]:
    """Return a block of a 7B as Block-AP trains it, and what gives the loss of a step: its data are on the device."""
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
    hidden, target = (stream.gather([0, 1]).to(sizes.device).float() for stream in (step.quantized, step.fp))
    call = step.call([0, 1])
    return lambda block: block_loss(walker.run(block, call, hidden), target), step.block


def compiled(sizes: Sizes) -> dict[str, Any]:
    """Forward and backward of a fake-quantized block of a 7B, as it is and under `torch.compile`: milliseconds."""
    forward, block = fake_block(sizes)
    trainable_parameters(block, FitConfig())

    def run(block: Any) -> None:
        forward(block).backward()
        block.zero_grad()

    found = {"as it is": _median_ms(sizes, lambda: run(block))}
    ready = torch.compile(block)
    found["first, s"] = sizes.wall_s(lambda: run(ready))
    return found | {"compiled": _median_ms(sizes, lambda: run(ready))}


def _median_ms(sizes: Sizes, work: Any) -> float:
    return median([sizes.wall_s(work) * 1e3 for _ in range(10)][3:])


def _precision(sizes: Sizes) -> Literal["bfloat16", "float32"]:
    return "float32" if sizes.dry else "bfloat16"


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
    "wide": (35.0, wide),
    "block-step": (12.0, block_step),
    "compiled": (40.0, compiled),
    "deepspeed": (10.0, deepspeed_dtype),
}
