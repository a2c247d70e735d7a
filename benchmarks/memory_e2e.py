"""Memory of a training step of E2E-QP on a GPU, computed without one and without allocating: fake tensors are counted.

    python benchmarks/memory_e2e.py                          7B, 2 x 4096 tokens, 2 bits in groups of 64
    python benchmarks/memory_e2e.py --model 13b --bits 3     another one

Model, loss and recomputation are those of the trainer. Products with packed weights are stand-ins that allocate what
kernels do: a result, and in the meantime a dense copy of the weight, and one of its gradient. Not counted: the CUDA
context (about 0.5 GB), what the allocator loses to fragments, and scratch memory inside torch's own operators.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from transformers import LlamaConfig, LlamaForCausalLM

from eqat_kernels.tensors import cast, product_dtype
from eqat_mm.blocks.arch import set_submodule
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.e2e_qp import E2EQPConfig, scale_parameters, trainable_groups
from eqat_mm.train.losses import CHUNK, cross_entropy
from llava_adapters.llama import ARCH

GB = 1e9
MODELS: dict[str, dict[str, int]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
"""Llama-2, by the number of its parameters; the vocabulary has 32,000 words."""


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        parts: what is there all the time, by name.
        kept: what the forward and the loss leave for the backward.
        peak: the most at any moment of a step, with `parts`.
    """

    parts: dict[str, int]
    kept: int
    peak: int

    def rows(self) -> list[tuple[str, int]]:
        """Return the table: what the peak consists of."""
        passing = self.peak - sum(self.parts.values()) - self.kept
        rest = {"kept for the backward": self.kept, "gradients, and what passes": passing, "peak": self.peak}
        return list((self.parts | rest).items())


class Counted(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and note what it made."""
        return tree_map_only(Tensor, self._note, func(*args, **(kwargs or {})))

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen[storage] = None
            self._add(storage.nbytes())
            weakref.finalize(storage, self._add, -storage.nbytes())
        return tensor

    def _add(self, count: int) -> None:
        self.live += count
        self.peak = max(self.peak, self.live)

    def forget(self, tensors: list[Tensor]) -> None:
        """Leave out what was there before."""
        for tensor in tensors:
            self._seen[tensor.untyped_storage()] = None


def step_memory(config: LlamaConfig, spec: QuantSpec, batch: int, length: int, *, fake: bool = True) -> Memory:
    """Return the memory of a training step with recomputation.

    Args:
        config: of the model; what is not quantized is bfloat16.
        spec: of its packed linears.
        batch: sequences.
        length: their tokens.
        fake: count without allocating.
    """
    with FakeTensorMode() if fake else nullcontext(), as_on_a_gpu():
        model = packed_model(config, spec)
        parts = parts_of(model)
        with Counted() as counted:
            counted.forget([*model.parameters(), *model.buffers()])
            kept = train_a_step(model, torch.zeros(batch, length, dtype=torch.int64), counted)
    return Memory(parts, kept, sum(parts.values()) + counted.peak)


def packed_model(config: LlamaConfig, spec: QuantSpec) -> LlamaForCausalLM:
    """Return a model whose blocks hold packed linears, as `eqat_mm.load` makes it on a GPU."""
    model = LlamaForCausalLM(config)
    for block in ARCH.find_blocks(model):
        for path, linear in ARCH.named_linears(block):
            set_submodule(block, path, PackedLinear(linear.in_features, linear.out_features, spec))
    for name, parameter in model.named_parameters():
        if not name.endswith(".weight_scale"):
            parameter.data = parameter.data.bfloat16()
    trainable_groups(model, None, E2EQPConfig())
    model.train()
    model.activation_checkpointing_enable()
    return model


def parts_of(model: nn.Module) -> dict[str, int]:
    """Return the bytes that are there all the time."""
    steps = sum(parameter.nbytes for parameter in scale_parameters(model))
    everything = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    packed = sum(tensor.nbytes for name, tensor in model.named_buffers() if ".weight_" in name)
    return {
        "packed weights": packed,
        "step sizes, float32": steps,
        "their two moments in AdamW": 2 * steps,
        "embedding, head, norms, bfloat16": everything - packed - steps,
    }


def train_a_step(model: LlamaForCausalLM, tokens: Tensor, counted: Counted) -> int:
    """Run forward and backward; return the bytes that are kept between them."""
    columns = torch.arange(tokens.shape[1] - 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=columns).logits
    loss = cross_entropy(logits, tokens[:, 1:], tokens[:, 1:].numel())
    del logits
    kept = counted.live
    loss.backward()
    return kept


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let packed linears allocate what kernels on a GPU do, and the loss take a GPU's chunks."""
    with patch.object(PackedLinear, "forward", _stand_in), patch.dict(CHUNK, {"cpu": CHUNK["cuda"]}):
        yield


def _stand_in(linear: PackedLinear, x: Tensor) -> Tensor:
    y: Tensor = _Product.apply(cast(x, product_dtype(x)), linear.weight_scale, linear.layout.out_features)
    return y


class _Product(torch.autograd.Function):
    """Keeps its input, like the kernels; its results are zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, out_features: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        weight = x.new_zeros(out_features, x.shape[-1])
        return x.new_zeros(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale = ctx.saved_tensors
        weight = x.new_zeros(grad.shape[-1], x.shape[-1])
        grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
        del weight, grad_weight
        return grad_x, torch.zeros_like(scale), None


def main() -> None:
    """Print the table of one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="7b")
    for name, default in {"bits": 2, "group_size": 64, "batch": 2, "length": 4096}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    config = LlamaConfig(vocab_size=32_000, max_position_embeddings=asked.length, **MODELS[asked.model])
    found = step_memory(config, QuantSpec(asked.bits, asked.group_size), asked.batch, asked.length)
    print(
        f"E2E-QP of {asked.model}, {asked.batch} x {asked.length} tokens, {asked.bits} bits, group {asked.group_size}"
    )
    for name, count in found.rows():
        print(f"{name:<36}{count / GB:>7.2f} GB")


if __name__ == "__main__":
    main()
