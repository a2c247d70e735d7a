"""What the end-to-end trainers train, on tiny models: language models on text, LLaVAs on conversations."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from eqat_mm.blocks.arch import Arch
from eqat_mm.checkpoint.adapters import add_adapters
from eqat_mm.checkpoint.read import load
from eqat_mm.commands.plumbing.models import load_model
from eqat_mm.commands.plumbing.samples import Samples, image_text_samples
from eqat_mm.commands.verbs.quantize import RTNJob, rtn
from eqat_mm.data.image_text.settings import ImageTextData
from eqat_mm.runtime.device import processes
from eqat_mm.train.e2e_qp import E2EQPConfig, run_e2e_qp
from eqat_mm.train.end_to_end import EndToEndConfig, WindowDataset, training_arguments
from eqat_mm.train.llm_qat import LLMQATConfig, prepare, run_llm_qat
from eqat_mm.train.lora import LoRA
from llava_adapters import arch_for
from llava_adapters.tiny import IMAGE_TOKEN
from tests.tiny_llava import save_tiny_llava
from tests.tiny_model import save_tiny, word_tokenizer
from tests.train.problems import CPU, SPEC

BATCH = 4
SAMPLES = 23
SETTINGS: dict[str, Any] = {
    "max_steps": 6,
    "batch_size": BATCH,
    "accumulation": 1,
    "logging_steps": 1,
    "save_steps": 2,
    "learning_rate": 2e-3,
    "precision": "float32",
}
"""Six steps, which are an epoch; the last has a sample less."""


@dataclass(frozen=True)
class Case:
    """One thing to train, always from the same start.

    Attributes:
        make: returns the model.
        train: trains it in a folder with some settings changed; returns the log.
    """

    make: Callable[[], PreTrainedModel]
    train: Callable[..., list[dict[str, Any]]]


def cases_in(folder: Path, family: str, trains: str) -> Case:
    """Return the training of `trains` of a tiny model.

    Args:
        folder: kept between calls, so that models and data are made once.
        family: name of a shipped adapter.
        trains: as in `E2EQPConfig`, or `llm-qat`.
    """
    place = folder / family
    if not place.exists():
        _save(place, family)
    arch = arch_for(family)
    return _llm_qat(place, arch) if trains == "llm-qat" else _e2e_qp(place, arch, trains)


def _save(place: Path, family: str) -> None:
    arch = arch_for(family)
    if family == "llama":
        save_tiny(place).folder.rename(place / "model")
    elif arch.projector is None:
        model: Any = arch.tiny()[0]
        model.save_pretrained(place / "model")
        word_tokenizer().save_pretrained(place / "model")
    else:
        save_tiny_llava(place / "model", family, dtype=torch.float32)
        save_conversations(place / "mixed.json")
    rtn(RTNJob(model=str(place / "model"), output=place / "rtn", quant=SPEC))


def save_conversations(path: Path, count: int = SAMPLES) -> None:
    """Save conversations with their images, of which every fourth is about none."""
    draw = torch.Generator().manual_seed(0)

    def words(most: int) -> str:
        number = int(torch.randint(1, most, (), generator=draw))
        return " ".join(f"w{word}" for word in torch.randint(5, 60, (number,), generator=draw).tolist())

    records = []
    for index in range(count):
        about_image = index % 4 > 0
        turns = [
            {"from": "human", "value": f"<image>\n{words(8)}" if about_image else words(8)},
            {"from": "gpt", "value": words(6)},
        ]
        record: dict[str, Any] = {"id": str(index), "conversations": turns}
        if about_image:
            colour = tuple(torch.randint(0, 255, (3,), generator=draw).tolist())
            Image.new("RGB", (16, 16), colour).save(path.with_name(f"{index}.png"))
            record["image"] = f"{index}.png"
        records.append(record)
    path.write_text(json.dumps(records), encoding="utf-8")


def windows() -> Tensor:
    """Random windows of tokens, [23, 16]."""
    return torch.randint(2, IMAGE_TOKEN, (SAMPLES, 16), generator=torch.Generator().manual_seed(3))


def _samples(place: Path, arch: Arch) -> Samples:
    if arch.projector is None:
        return Samples(WindowDataset(windows()), None, None, "")
    data = ImageTextData(source=str(place / "mixed.json"))
    return image_text_samples(place / "rtn" / "model", data, BATCH, place / "problems.jsonl")


def _e2e_qp(place: Path, arch: Arch, trains: Any) -> Case:
    lora = LoRA(rank=4, alpha=8, learning_rate=5e-3)
    settings = E2EQPConfig(**SETTINGS, trains=trains, lora=lora)

    def make() -> PreTrainedModel:
        unset_hf_deepspeed_config()  # of an earlier run: under ZeRO-3 it scatters what is built
        model = load(place / "rtn" / "model")
        if "lora" in trains:
            add_adapters(model, lora.rank, lora.alpha, seed=0)
        return model

    samples = _samples(place, arch)

    def train(
        model: PreTrainedModel, folder: Path, watch: Any = None, held_out: Any = None, **changes: Any
    ) -> list[dict[str, Any]]:
        config = replace(settings, **changes)
        return run_e2e_qp(
            model,
            samples.dataset,
            config,
            arguments_in(folder, config),
            teacher=None,
            projector=arch.find_projector(model),
            blank=samples.blank(),
            collator=samples.collator,
            order=samples.order,
            watch=watch,
            held_out=held_out,
        )

    return Case(make, train)


def _llm_qat(place: Path, arch: Arch) -> Case:
    """Learns from full precision where the model sees, else from labels."""
    settings = LLMQATConfig(**SETTINGS, bits="4-8-4", loss="kl" if arch.projector else "cross-entropy")

    def full() -> PreTrainedModel:
        unset_hf_deepspeed_config()  # of an earlier run: under ZeRO-3 it scatters what is built
        return load_model(place / "model", CPU)

    def make() -> PreTrainedModel:
        model = full()
        prepare(model, arch, settings)
        return model

    samples = _samples(place, arch)

    def train(
        model: PreTrainedModel, folder: Path, watch: Any = None, held_out: Any = None, **changes: Any
    ) -> list[dict[str, Any]]:
        config = replace(settings, **changes)
        given: dict[str, Any] = {"blank": samples.blank(), "collator": samples.collator, "order": samples.order}
        given |= {"teacher": full() if arch.projector else None, "watch": watch, "held_out": held_out}
        return run_llm_qat(model, samples.dataset, config, arguments_in(folder, config), **given)

    return Case(make, train)


def arguments_in(folder: Path, config: EndToEndConfig) -> Any:
    """Return the Trainer's arguments."""
    return training_arguments(config.among(processes()), folder, CPU)


def losses_of(log: list[dict[str, Any]]) -> list[float]:
    """Return the losses in a log."""
    return [record["loss"] for record in log if "loss" in record]


def trained_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what was trained, by name."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
