"""What a format of another engine promises, and the table of all formats."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from eqat_mm.export.opened import PackedModel, PackedWeight

FormatName = Literal["gguf", "mlx", "onnx", "gptq"]
"""Every format: its name here, its module in `_PLACES`."""

_PLACES: dict[str, str] = {
    "gguf": "eqat_mm.export.gguf.form",
    "mlx": "eqat_mm.export.mlx",
    "onnx": "eqat_mm.export.onnx",
    "gptq": "eqat_mm.export.gptq",
}


@dataclass(frozen=True)
class Choices:
    """What a user may choose of a format; each format takes what concerns it.

    Attributes:
        embedding: how GGUF holds embedding and head, `q8_0` or `f16`.
    """

    embedding: Literal["q8_0", "f16"] = "q8_0"


class Format(Protocol):
    """A format: a module has one as `FORM`.

    The order of calls: `refuse`, then `changed` of every weight, then `write`. Nothing is written before the last.
    """

    name: str

    def refuse(self, model: PackedModel, choices: Choices) -> None:
        """Check that the format holds this model at all: its architecture, bits, grid and groups.

        Raises:
            ExportError: it does not; says why, and the nearest choice that it holds exactly.
        """
        ...

    def changed(self, weight: PackedWeight) -> Tensor:
        """Return which groups the format would hold with other values, bool [O, G]; reads no codes."""
        ...

    def held(self, weight: PackedWeight) -> Tensor:
        """Return the weight as readers of the format compute it, float32 [O, I]."""
        ...

    def nearest(self, model: PackedModel) -> str:
        """Say what the format would hold exactly in place of a model some of whose groups change."""
        ...

    def size(self, model: PackedModel, choices: Choices) -> int:
        """Return about how many bytes `write` will write."""
        ...

    def write(self, model: PackedModel, folder: Path, choices: Choices) -> list[str]:
        """Write the files of the format into an empty folder, a tensor or a shard in memory at once.

        Tokenizer, processor, chat template, generation settings and licences are there already: what does not belong
        to the format may be removed.

        Returns:
            Lines for the model card: how the files are used.
        """
        ...


def format_called(name: str) -> Format:
    """Return the format of a name in `_PLACES`."""
    form: Format = import_module(_PLACES[name]).FORM
    return form
