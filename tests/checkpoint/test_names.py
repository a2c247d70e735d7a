"""Whatever the files of a source call their tensors, a checkpoint has the published names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import eqat_mm
from eqat_mm.blocks.source import open_model
from eqat_mm.blocks.weights import WeightSource
from eqat_mm.checkpoint import CheckpointWriter, seal
from eqat_mm.checkpoint.read import load_block
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json
from eqat_mm.train.rtn import run_rtn
from llava_adapters import arch_for
from tests.checkpoint.files import same_bytes, tensors_of
from tests.checkpoint.foreign import logits_of
from tests.tiny_llava import save_as_transformers_does, save_tiny_llava
from tests.tiny_model import tiny_llama

ARCHS = ("llava", "llava_next")
SPEC = QuantSpec(4, 32)

VLLM = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
    "lm_head.": "language_model.lm_head.",
}
"""What vLLM 0.33 makes of the names of a LLaVA, by their beginnings; its towers are called as in `VLLM_PARTS`."""

VLLM_PARTS = (
    *("language_model.model.layers.", "language_model.model.embed_tokens.", "language_model.model.norm."),
    *("language_model.lm_head.", "multi_modal_projector.linear_", "image_newline"),
    *(f"vision_tower.vision_model.{part}" for part in ("embeddings.", "encoder.layers.", "pre_layrnorm.")),
    "vision_tower.vision_model.post_layernorm.",
)

TRANSFORMERS_4 = {
    "language_model.model.": "model.language_model.",
    "vision_tower.vision_model.": "model.vision_tower.vision_model.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "image_newline": "model.image_newline",
    "language_model.lm_head.": "lm_head.",
}
"""What transformers 4.57 makes of published names, all of which are here."""


def rounded(full: Path, arch: str, folder: Path) -> Path:
    run_rtn(open_model(full, arch_for(arch)), SPEC, folder, source="tiny", provenance={})
    return folder / "model"


def begins(name: str, table: dict[str, str]) -> str:
    """Return a name as a reader with this table of beginnings has it."""
    for old, new in table.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


@pytest.mark.parametrize("arch", ARCHS)
def test_a_llava_that_transformers_saved_has_the_published_names(arch: str, tmp_path: Path) -> None:
    save_as_transformers_does(tmp_path / "mixed", arch, torch.bfloat16)
    save_tiny_llava(tmp_path / "published", arch)
    assert "vision_tower.embeddings.class_embedding" in tensors_of(tmp_path / "mixed")
    mixed, published = (
        tensors_of(rounded(tmp_path / name, arch, tmp_path / f"{name}-run")) for name in ("mixed", "published")
    )
    assert mixed.keys() == published.keys()
    assert all(same_bytes(mixed[name], published[name]) for name in mixed)
    assert [name for name in mixed if not begins(name, VLLM).startswith(VLLM_PARTS)] == []
    assert [name for name in mixed if not name.startswith(tuple(TRANSFORMERS_4))] == []


def test_a_head_and_a_tower_saved_apart_from_each_other_come_together(tmp_path: Path) -> None:
    """A language model that was saved without its head lacks a prefix; its checkpoint has it."""
    tiny_llama(tie_word_embeddings=True).model.save_pretrained(tmp_path / "base")
    assert "norm.weight" in tensors_of(tmp_path / "base")
    names = tensors_of(rounded(tmp_path / "base", "llama", tmp_path)).keys()
    assert all(name.startswith("model.") for name in names)


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of a version that kept the names of its source and wrote config.json as the source has it."""
    save_as_transformers_does(tmp_path / "mixed", "llava", torch.bfloat16)
    with monkeypatch.context() as patched:
        patched.setattr(WeightSource, "published_name", WeightSource.stored_name)
        patched.setattr(seal, "spelled_for_all", lambda config: config)
        folder = rounded(tmp_path / "mixed", "llava", tmp_path / "old")
    assert "vision_tower.embeddings.class_embedding" in tensors_of(folder)
    return folder


def test_a_checkpoint_with_the_names_of_its_source_is_read_and_saved_under_published_ones(
    old: Path, tmp_path: Path
) -> None:
    batches = save_tiny_llava(tmp_path / "published")
    new = rounded(tmp_path / "published", "llava", tmp_path / "new")
    model = eqat_mm.load(old)
    assert torch.equal(logits_of(model, batches[0]), logits_of(eqat_mm.load(new), batches[0]))
    model.save_pretrained(tmp_path / "saved")
    saved, expected = tensors_of(tmp_path / "saved"), tensors_of(new)
    assert saved.keys() == expected.keys()
    assert all(same_bytes(saved[name], expected[name]) for name in saved)
    assert read_json(tmp_path / "saved/config.json") == read_json(new / "config.json")


def test_a_run_that_an_older_version_began_goes_on(old: Path, tmp_path: Path) -> None:
    opened, whole = open_model(tmp_path / "mixed", arch_for("llava")), eqat_mm.load(old)
    name, block = opened.block_name(0), opened.blocks[0]
    load_block(CheckpointWriter(old, opened, SPEC).shard(0), opened, name, block, SPEC, torch.device("cpu"))
    expected = whole.get_submodule(name).state_dict()
    assert all(torch.equal(block.state_dict()[key], value) for key, value in expected.items())
