"""The one evaluator of `quality.py`: what every model is asked, whoever made it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eqat_eval.generation import judge_generation
from eqat_mm.blocks.source import open_model
from eqat_mm.checkpoint.folders import is_packed, load_tokenizer
from eqat_mm.commands.plumbing.models import load_model
from eqat_mm.commands.verbs.evaluate import Bench
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.data.text.windows import text_windows
from eqat_mm.errors import CheckpointError
from eqat_mm.runtime.precision import Precision
from llava_adapters import arch_of_folder

CPU = torch.device("cpu")
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that returns the largest number of a list.",
    "List three animals that can fly.",
    "If I have 3 apples and buy 4 more, how many apples do I have?",
    "¿Cuál es la capital de España?",
)
TOKENS = 64
"""Of an answer, at most."""
BATCH = 4


class Judge:
    """Asks models about the same texts, and the same questions.

    Args:
        full: folder of the full-precision model.
        texts: held-out text by name.
        precision: of matrix products.
        prompts: questions to answer.
        tokens: of an answer, at most.
    """

    def __init__(
        self,
        full: Path,
        texts: dict[str, TextWindows],
        precision: Precision = "float32",
        prompts: tuple[str, ...] = PROMPTS,
        tokens: int = TOKENS,
    ) -> None:
        self.tokenizer = load_tokenizer(full)
        self.prompts, self.tokens = prompts, tokens
        windows = {name: text_windows(self.tokenizer, config) for name, config in texts.items()}
        self.benches = {name: Bench(full, each, BATCH, precision, CPU) for name, each in windows.items()}

    @property
    def decides(self) -> dict[str, Any]:
        """What decides its verdict beside the model, JSON-ready."""
        texts = {name: bench.decides | {"reference": None} for name, bench in self.benches.items()}
        return {"texts": texts, "prompts": list(self.prompts), "tokens": self.tokens}

    def verdict(self, folder: Path, bits: int) -> dict[str, Any]:
        """Return what there is to say of a model, JSON-ready.

        Args:
            folder: of the model.
            bits: of a weight; 0 in full precision.

        Raises:
            CheckpointError: predictions that are not finite, or more values in a group of weights than `bits` allow.
        """
        if bits and not is_packed(folder):
            require_grid(folder, bits)
        found = {name: bench.measure(folder).as_dict() for name, bench in self.benches.items()}
        model: Any = load_model(folder, CPU)
        chat = self.tokenizer.chat_template is not None
        said = judge_generation(model, self.tokenizer, self.prompts, self.tokens, chat=chat)
        return {"texts": found, "generation": said.as_dict() | {"asked": list(self.prompts)}}


def require_grid(folder: Path, bits: int, smallest_group: int = 32) -> None:
    """Check that a dequantized model is on a grid: a layer that was left as it was would flatter its method.

    Args:
        folder: of the model.
        bits: of a weight.
        smallest_group: a run of so many inputs lies within one group, whatever its size.

    Raises:
        CheckpointError: some run of weights has more than 2^bits values.
    """
    for name, weight in _weights(folder):
        grouped = weight.unflatten(1, (-1, smallest_group)).sort(-1).values
        values = int((grouped.diff(dim=-1) != 0).sum(-1).max()) + 1
        if values > 1 << bits:
            raise CheckpointError(
                where=f"{folder}: {name}",
                given=f"{values} values among {smallest_group} weights",
                allowed=f"{1 << bits}: {bits} bits each",
                do="look at what the peer's script does with this layer",
            )


def _weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the linears of the blocks by name."""
    opened = open_model(folder, arch_of_folder(folder))
    for index, block in enumerate(opened.blocks):
        for path, _ in opened.arch.named_linears(block):
            name = f"{opened.block_name(index)}.{path}.weight"
            yield name, opened.source.read(name)
