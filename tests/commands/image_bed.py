"""A tiny model that sees, with text and conversations to calibrate it on."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from eqat_mm.blocks.source import OpenModel, open_model
from eqat_mm.commands.plumbing.calibration import Calibration, calibration_of
from eqat_mm.commands.verbs.quantize import BlockAPJob
from eqat_mm.data.image_text.settings import Conversations
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.fit import FitConfig
from llava_adapters import arch_for
from llava_adapters.tiny_processor import WORDS

CPU = torch.device("cpu")
SPEC = QuantSpec(2, 32)
FIT = FitConfig(epochs=1, batch_size=2, lr_weight=1e-3, lr_scale=1e-3, validation_samples=4)
COUNT = 12


@dataclass
class Bed:
    """A tiny model that sees, text, and conversations about images of several sizes."""

    name: str
    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "full"

    @property
    def text(self) -> TextWindows:
        return TextWindows(str(self.folder / "text.txt"), length=16, count=COUNT, part="all")

    @property
    def talks(self) -> Conversations:
        return Conversations(str(self.folder / "talks.json"), max_length=500)

    def open(self) -> OpenModel:
        return open_model(self.model, arch_for(self.name))

    def found(self, share: float = 0.5) -> Calibration:
        return calibration_of(self.model, self.text, self.talks, share, self.folder / "run")

    def job(self, output: Path, **changes: Any) -> BlockAPJob:
        settings: dict[str, Any] = {"quant": SPEC, "fit": FIT, "calibration": self.text, "conversations": self.talks}
        settings |= {"model": str(self.model), "output": output, "recipe_for": (str(self.model),)}
        return BlockAPJob(**(settings | {"precision": "float32", "device": "cpu"} | changes))


def bed_of(name: str, folder: Path) -> Bed:
    arch = arch_for(name)
    assert arch.processor is not None
    model: Any = arch.tiny()[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() > 1:  # large enough that every part matters
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "full")
    processor: Any = arch.processor()
    processor.save_pretrained(folder / "full")
    draw = random.Random(0)
    words = [" ".join(draw.choices(WORDS[2:40], k=40)) for _ in range(40)]
    (folder / "text.txt").write_text("\n\n".join(words), encoding="utf-8")
    records = [record_of(folder, number, draw) for number in range(24)]
    (folder / "talks.json").write_text(json.dumps(records), encoding="utf-8")
    return Bed(name, folder)


def record_of(folder: Path, number: int, draw: random.Random) -> dict[str, Any]:
    """One image, now and then none; questions of several lengths."""
    asked = " ".join(draw.choices(WORDS[2:40], k=1 + 4 * (number % 5)))
    record: dict[str, Any] = {"id": str(number)}
    if number % 6 != 5:
        size = (draw.choice([24, 40]), draw.choice([24, 40]))
        Image.frombytes("RGB", size, draw.randbytes(3 * size[0] * size[1])).save(folder / f"{number}.png")
        asked, record["image"] = f"<image>\n{asked}", f"{number}.png"
    answer = {"from": "gpt", "value": draw.choice(WORDS[2:40])}
    return record | {"conversations": [{"from": "human", "value": asked}, answer]}
