"""One adapter with its tiny model in a folder, and what all checks do with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from eqat_mm.blocks.arch import Arch, Inputs
from eqat_mm.blocks.source import OpenModel, open_model
from eqat_mm.blocks.walker import BlockStep, BlockWalker, capture_front
from eqat_mm.errors import AdapterError

CPU = torch.device("cpu")
ANOTHER_ROUTE = 1e-4
"""Largest relative difference of float32 tensors that are one thing computed in two ways."""


class NotHere(Exception):
    """A check that an adapter gives no occasion for; says why."""


@dataclass
class Call:
    """Input and output of one call of a module."""

    name: str
    input: Tensor
    output: Tensor


class Case:
    """An adapter, and its tiny model saved to a folder.

    Args:
        arch: the adapter.
        folder: an empty one; checks write there, too.

    Attributes:
        batches: of inputs, as `Arch.tiny` gives them.
        saved: folder of the full-precision model.
    """

    def __init__(self, arch: Arch, folder: Path) -> None:
        self.arch, self.folder, self.saved = arch, folder, folder / "full"
        made: tuple[Any, list[Inputs]] = arch.tiny()
        self._tiny, self.batches = made
        self._tiny.save_pretrained(self.saved)

    def open(self) -> OpenModel:
        """Open the saved model, as commands do."""
        return open_model(self.saved, self.arch)

    def model(self, folder: Path | None = None, *, split: bool = True) -> Any:
        """Load a full-precision model as transformers does, in float32.

        Args:
            folder: of the model; None takes the saved one.
            split: its experts, as the walker sees them.
        """
        auto = getattr(transformers, self.arch.auto_class)
        # Without gradients, as blocks are read: torch chooses another product of matrices for what will have some.
        model = auto.from_pretrained(folder or self.saved, dtype=torch.float32).eval().requires_grad_(False)
        if split:
            self.arch.split_experts(model)
        return model

    def in_16_bits(self) -> Path:
        """Save a random model of the same kind in bfloat16, if its sizes allow of a width whose root is not exact."""
        config = copy.deepcopy(self._tiny.config)
        text = config.get_text_config(decoder=True)
        narrow, text.hidden_size = text.hidden_size, text.hidden_size * 3 // 2
        for name in ("num_attention_heads", "num_key_value_heads"):  # as wide as before: rotary tables are of a width
            setattr(text, name, getattr(text, name) * 3 // 2)
        for part in (config, getattr(config, "vision_config", None)):
            for name in ("out_hidden_size", "projection_dim"):  # vision towers end in the width of the language
                if getattr(part, name, None) == narrow:
                    setattr(part, name, text.hidden_size)
        model = _built(type(self._tiny), config) or copy.deepcopy(self._tiny)
        nn.Module.to(model, torch.bfloat16).save_pretrained(self.folder / "bfloat16")
        return self.folder / "bfloat16"

    def walk(
        self, batches: list[Inputs], batch_tokens: int = 4096, folder: Path | None = None
    ) -> Iterator[tuple[OpenModel, BlockStep]]:
        """Yield every step of a walk over the full-precision blocks after both streams have passed the block."""
        opened = open_model(folder or self.saved, self.arch)
        samples = capture_front(opened, batches, torch.float32)
        walker = BlockWalker(opened, samples, device=CPU, batch_tokens=batch_tokens)
        for step in walker.walk():
            walker.advance_fp(step)
            walker.advance_quantized(step)
            yield opened, step

    def outputs_of_blocks(self, model: Any, inputs: Inputs) -> list[Tensor]:
        """Return the hidden states behind every block in the model's own forward."""
        blocks = {str(index): block for index, block in enumerate(self.arch.find_blocks(model))}
        return [call.output for call in calls_of(blocks, model, inputs)]

    def require(self, holds: bool, given: str, allowed: str, do: str) -> None:
        """Check something.

        Raises:
            AdapterError: it does not hold.
        """
        if not holds:
            raise AdapterError(f"adapter {self.arch.name}", given, allowed, do)


@torch.no_grad()
def calls_of(modules: Mapping[str, nn.Module], model: Any, inputs: Inputs) -> list[Call]:
    """Run a model and return the calls of some modules in it, in order; hidden states are what comes first."""
    calls: list[Call] = []

    def record(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            first = args[0] if args else next(iter(kwargs.values()))
            calls.append(Call(name, first.clone(), (output[0] if isinstance(output, tuple) else output).clone()))

        return hook

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(record(name), with_kwargs=True))
        model(**inputs, use_cache=False)
    return calls


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest number that is expected; infinite where shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    size = expected.abs().max().item()
    return float((found - expected).abs().max().item() / (size or 1.0))


def _built(kind: Any, config: Any) -> Any:
    """Return a random model of a configuration that was changed; None where its sizes no longer fit one another."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return kind(config).eval()
    except Exception:  # noqa: BLE001 - whatever a model's own code says of its sizes
        return None
