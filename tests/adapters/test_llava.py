"""LLaVA: real shapes without weights, published names, what is read when, and the layout that is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from eqat_mm.blocks.arch import Arch
from eqat_mm.blocks.source import WeightSource, empty_model, open_model
from eqat_mm.blocks.walker import BlockWalker, capture_front
from eqat_mm.checkpoint.layout import ignored_linears
from eqat_mm.errors import AdapterError
from eqat_mm.runtime.files import write_json
from llava_adapters import arch_for, arch_of_folder, resolve_alias
from llava_adapters.aliases import ALIASES
from llava_adapters.original import CONVERTED
from llava_adapters.tiny import IMAGE_TOKEN
from tests.adapters.published import (
    MISTRAL_7B,
    VICUNA_7B,
    VICUNA_13B,
    YI_34B,
    llava_15,
    llava_16,
)
from tests.tiny_llava import save_tiny_llava

REAL = {
    "llava-1.5-7b": (llava_15(VICUNA_7B), 32, 6_476_005_376),
    "llava-1.5-13b": (llava_15(VICUNA_13B), 40, 12_687_769_600),
    "llava-v1.6-mistral-7b": (llava_16(MISTRAL_7B), 32, 6_979_321_856),
    "llava-v1.6-vicuna-7b": (llava_16(VICUNA_7B), 32, 6_476_005_376),
    "llava-v1.6-vicuna-13b": (llava_16(VICUNA_13B), 40, 12_687_769_600),
    "llava-v1.6-34b": (llava_16(YI_34B), 60, 33_470_545_920),
}
"""Alias -> configuration, decoder blocks, weights of the linears in them."""

FRONT = ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.embed_tokens.")


@pytest.fixture(params=["llava", "llava_next"])
def arch(request: pytest.FixtureRequest) -> Arch:
    return arch_for(request.param)


@pytest.fixture
def folder(arch: Arch, tmp_path: Path) -> Path:
    """A tiny model in the names of the published files."""
    save_tiny_llava(tmp_path, arch.name)
    return tmp_path


@pytest.mark.parametrize("alias", REAL)
def test_real_shapes(alias: str, tmp_path: Path) -> None:
    config, depth, weights = REAL[alias]
    assert alias in ALIASES
    write_json(tmp_path / "config.json", config)
    arch = arch_of_folder(tmp_path)
    model = empty_model(transformers.AutoConfig.from_pretrained(tmp_path), arch)
    assert all(parameter.is_meta for parameter in model.parameters())
    blocks = arch.find_blocks(model)
    linears = [linear for block in blocks for _, linear in arch.named_linears(block)]
    assert (len(blocks), len(linears)) == (depth, 7 * depth)
    assert sum(linear.weight.numel() for linear in linears) == weights
    everywhere = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    patterns = [re.compile(entry.removeprefix("re:")) for entry in ignored_linears(arch, model)]
    kept = {name for name in everywhere if any(pattern.match(name) for pattern in patterns)}
    assert {id(everywhere[name]) for name in everywhere.keys() - kept} == {id(linear) for linear in linears}
    tops = {re.sub(r"\.(encoder|linear_\d).*", "", name) for name in kept}
    assert tops == {"model.vision_tower", "model.multi_modal_projector", "lm_head"}


def test_published_names_are_those_of_the_modules(arch: Arch, folder: Path) -> None:
    stored = WeightSource.names_of(folder / "model.safetensors")
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in stored
    assert "language_model.lm_head.weight" in stored
    assert "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight" in stored
    opened = open_model(folder, arch)
    assert set(opened.source.names()) == set(opened.model.state_dict())
    assert sorted(map(opened.source.published_name, opened.source.names())) == sorted(stored)
    packed = opened.source.published_name("model.language_model.layers.1.mlp.up_proj.weight_packed")
    assert packed == "language_model.model.layers.1.mlp.up_proj.weight_packed"
    expected = transformers.AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    assert all(torch.equal(opened.source.read(name), value) for name, value in expected.items())


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors read since."""
    names: list[str] = []
    read = WeightSource.read

    def spy(self: WeightSource, name: str) -> torch.Tensor:
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(WeightSource, "read", spy)
    return names


def test_text_never_reads_the_vision_tower(arch: Arch, folder: Path, reads: list[str]) -> None:
    _, batches = arch.tiny()
    text = [batch for batch in batches if "pixel_values" not in batch]
    opened = open_model(folder, arch)
    walker = BlockWalker(opened, capture_front(opened, text, torch.float32), device=torch.device("cpu"))
    for step in walker.walk():
        walker.advance_fp(step)
    front = [name for name in reads if not name.startswith(arch.blocks)]
    newline = ["model.image_newline"] if arch.name == "llava_next" else []
    assert sorted(front) == sorted([*newline, "model.language_model.embed_tokens.weight"])


def test_images_read_the_front_once_and_free_it(arch: Arch, folder: Path, reads: list[str]) -> None:
    _, batches = arch.tiny()
    opened = open_model(folder, arch)
    samples = list(capture_front(opened, batches, torch.float32))
    assert len(samples) == len(batches)
    assert len(reads) == len(set(reads))
    assert {name for name in reads if name != "model.image_newline"} == {
        name for name in opened.source.names() if name.startswith(FRONT)
    }
    assert all(parameter.is_meta for parameter in opened.model.parameters())
    assert not any(buffer.is_meta for buffer in opened.model.buffers())
    again = list(capture_front(opened, batches, torch.float32))
    assert all(torch.equal(one.hidden, other.hidden) for one, other in zip(samples, again, strict=True))


def test_the_blocks_see_the_images(arch: Arch, folder: Path) -> None:
    _, batches = arch.tiny()
    opened = open_model(folder, arch)
    other = batches[0] | {"pixel_values": batches[0]["pixel_values"].roll(1, 0)}
    first, second = capture_front(opened, [batches[0], other], torch.float32)
    images = batches[0]["input_ids"] == IMAGE_TOKEN
    differs = (first.hidden != second.hidden).any(-1)
    assert not (differs & ~images).any()
    assert torch.equal(differs.any(1), images.any(1))


@pytest.mark.parametrize("name", CONVERTED)
def test_the_original_repositories_are_refused_before_the_download(name: str) -> None:
    with pytest.raises(AdapterError) as caught:
        resolve_alias(f"liuhaotian/{name}")
    assert CONVERTED[name] in caught.value.do
    assert CONVERTED[name] in ALIASES.values()


ORIGINAL: dict[str, Any] = {"mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}


@pytest.mark.parametrize(
    ("name", "config", "converted"),
    [
        ("llava-v1.5-7b", {"model_type": "llava", **ORIGINAL}, "llava-hf/llava-1.5-7b-hf"),
        ("LLaVA-v1.5-13B", {"model_type": "llava_llama", **ORIGINAL}, "llava-hf/llava-1.5-13b-hf"),
        ("copy", {"model_type": "llava_mistral", "_name_or_path": "liuhaotian/llava-v1.6-mistral-7b"}, "v1.6-mistral"),
        ("mine", {"model_type": "llava_llama", **ORIGINAL}, "llava-hf has llava-hf/llava-1.5-7b-hf, llava-hf/"),
        ("llava-v1.5-7b-lora", {"model_type": "llava_llama", **ORIGINAL}, "llava-hf has llava-hf/llava-1.5-7b-hf"),
    ],
    ids=["by folder", "any case", "by config", "unknown", "unknown variant"],
)
@pytest.mark.parametrize("adapter", [None, "llava"])
def test_the_original_layout_names_the_converted_repository(
    tmp_path: Path, name: str, config: dict[str, Any], converted: str, adapter: str | None
) -> None:
    (tmp_path / name).mkdir()
    write_json(tmp_path / name / "config.json", config)
    with pytest.raises(AdapterError) as caught:
        arch_of_folder(tmp_path / name, adapter)
    assert str(tmp_path / name) in caught.value.where
    assert "first release" in caught.value.given
    assert converted in caught.value.do
