"""The CPU path of the kernels as ratios: interleaved repetitions of one run, medians."""

from __future__ import annotations

import copy
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from kernel_peers import peers
from timing import interleaved
from torch import Tensor, nn

from eqat_kernels import PackedLayout, pack, quant_linear, use
from eqat_mm.blocks.arch import set_submodule
from eqat_mm.commands.plumbing.models import load_model, model_folder
from eqat_mm.quant.convert import to_fake, to_packed
from eqat_mm.quant.fake_linear import fake_quant_linears, project
from eqat_mm.quant.init import initial_grid
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.memory import keep_freed_memory
from llava_adapters import arch_of_folder

BLOCKS = {"step": (576, 1536, 1024), "step-7b": (4096, 11008, 128)}
"""Hidden size, MLP size and tokens of a training step."""

PROMPT, STEPS = 512, 16


def cpu_ratios(only: list[str] | None) -> None:
    """Print the chosen measurements, by default all but the peers."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    keep_freed_memory()
    for name, (hidden, mlp, tokens) in BLOCKS.items():
        if not only or name in only:
            for precision in (torch.float32, torch.bfloat16):
                plain, fake = block_step(hidden, mlp, tokens, precision)
                print(f"{name}, {precision}: plain {plain:.1f} ms, fake-quantized {fake:.1f} ms: {fake / plain:.3f}")
    if not only or "memory" in only:
        for dtype in ("float32", "bfloat16"):
            with get_context("spawn").Pool(1) as pool:
                print(f"quant_linear backward, {dtype}: {pool.apply(backward_memory, (dtype,)):.2f} dense weights")
    if not only or "decode" in only:
        generation()
    if only and "peers" in only:
        peers()


def decoder_block(hidden: int, mlp: int) -> nn.Module:
    """A Llama block of these sizes, SmolLM2's with its three key-value heads of nine, else with heads of 128."""
    small = hidden == 576
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=1, vocab_size=8,
        num_attention_heads=9 if small else hidden // 128, num_key_value_heads=3 if small else hidden // 128,
    )  # fmt: skip
    return transformers.LlamaModel(config)


def block_step(hidden: int, mlp: int, tokens: int, precision: torch.dtype) -> tuple[float, float]:
    """Milliseconds of a training step with AdamW, plain and fake-quantized at 2 bits in groups of 64."""
    plain = decoder_block(hidden, mlp)
    fake, spec = copy.deepcopy(plain), QuantSpec(2, 64)
    for name, module in list(fake.named_modules()):
        if isinstance(module, nn.Linear):
            set_submodule(
                fake, name, to_fake(module, initial_grid(module.weight, spec, layer=name, init="minmax"), spec)
            )
    x, target = torch.randn(4, tokens // 4, hidden), torch.randn(4, tokens // 4, hidden)

    def trainer(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
        linears = fake_quant_linears(model)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
                output = model(inputs_embeds=x, use_cache=False).last_hidden_state
            nn.functional.mse_loss(output.float(), target).backward()
            optimizer.step()
            project(linears)

        return step

    # enough that the median is of steps that reuse freed memory; the first ones of the large block grow the heap
    first, second = interleaved([trainer(plain), trainer(fake)], 40 if hidden == 576 else 15)
    return first * 1e3, second * 1e3


def backward_memory(dtype_name: str) -> float:
    """Growth of the peak resident set in a backward of an 11008 x 4096 layer, in dense weights of it."""
    dtype, layout = getattr(torch, dtype_name), PackedLayout(2, 64, 11008, 4096)
    words = torch.randint(0, 1 << 30, (11008, 256), dtype=torch.int32)
    scale = torch.rand(11008, 64, requires_grad=True)
    zeros = pack(torch.ones(64, 11008, dtype=torch.uint8), 2).T.contiguous()
    x = torch.randn(4, 4096, dtype=dtype, requires_grad=True)
    small = PackedLayout(2, 64, 64, 4096)
    quant_linear(x, words[:64], scale[:64], zeros[:4], small).sum().backward()  # loads what torch loads at first
    y = quant_linear(x, words, scale, zeros, layout)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, from what is held now
    before = peak_bytes()
    y.sum().backward()
    return (peak_bytes() - before) / (11008 * 4096 * dtype.itemsize)


def peak_bytes() -> int:
    """Peak resident set since it was reset (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@torch.no_grad()
def generation() -> None:
    """Print tokens per second of the demo model, dense float32, packed, and packed with the naive reference."""
    folder = model_folder("smollm2-135m")
    dense = load_model(folder, torch.device("cpu")).float().eval()
    arch = arch_of_folder(folder)
    tokens = torch.randint(0, 40_000, (1, PROMPT))
    for bits in (4, 2):
        packed, spec = copy.deepcopy(dense), QuantSpec(bits, 64)
        for block in arch.find_blocks(packed):
            for path, linear in arch.named_linears(block):
                grid = initial_grid(linear.weight, spec, layer=path, init="minmax")
                set_submodule(block, path, to_packed(to_fake(linear, grid, spec)))
        for what, run, count in (("decode", decode, STEPS), ("prefill", prefill, PROMPT)):

            def naive(run: Callable[..., Any] = run, packed: nn.Module = packed) -> None:
                with use("reference"):
                    run(packed, tokens)

            calls = [lambda run=run: run(dense, tokens), lambda run=run, packed=packed: run(packed, tokens), naive]  # type: ignore[misc]
            dense_s, packed_s, naive_s = interleaved(calls, 7)
            print(
                f"{what}, {bits} bits: dense {count / dense_s:.1f} tokens/s, packed/dense"
                f" {dense_s / packed_s:.2f}, packed/naive {naive_s / packed_s:.2f}"
            )


def decode(model: nn.Module, tokens: Tensor) -> None:
    """Generate `STEPS` tokens, one row each."""
    cache = transformers.DynamicCache()
    for step in range(STEPS):
        model(input_ids=tokens[:, step : step + 1], past_key_values=cache, use_cache=True)


def prefill(model: nn.Module, tokens: Tensor) -> None:
    """Read the prompt."""
    model(input_ids=tokens, use_cache=False, logits_to_keep=1)
