"""Quantized LLaVA folders: only the language tower is packed, everything else is as it was published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import eqat_mm
from eqat_mm.blocks.arch import Inputs
from eqat_mm.blocks.source import open_model
from eqat_mm.checkpoint import save_like
from eqat_mm.checkpoint.read import load_block
from eqat_mm.checkpoint.write import CheckpointWriter
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json
from eqat_mm.train.block_ap import BlockAPConfig, run_block_ap
from eqat_mm.train.fit import FitConfig
from eqat_mm.train.rtn import run_rtn
from llava_adapters import arch_for
from tests.checkpoint.files import same_bytes, tensors_of
from tests.checkpoint.foreign import assert_read_alike, foreign, logits_of, logits_of_a_stranger
from tests.tiny_llava import save_tiny_llava
from tests.tolerances import assert_close

ARCHS = ("llava", "llava_next")
CASES = [(arch, spec) for arch in ARCHS for spec in (QuantSpec(3, 32), QuantSpec(2, 64, symmetric=True))]
TOWER = "model.language_model.layers."


@dataclass
class Packed:
    """A tiny LLaVA, rounded to nearest, and batches for it."""

    full: Path
    folder: Path
    batches: list[Inputs]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1].name}")
def case(request: pytest.FixtureRequest) -> tuple[str, QuantSpec]:
    """An adapter and a spec."""
    arch, spec = request.param
    return arch, spec


@pytest.fixture(scope="module")
def packed(case: tuple[str, QuantSpec], tmp_path_factory: pytest.TempPathFactory) -> Packed:
    arch, spec = case
    folder = tmp_path_factory.mktemp("packed")
    batches = save_tiny_llava(folder / "full", arch, torch.float16)
    run_rtn(open_model(folder / "full", arch_for(arch)), spec, folder, source="tiny", provenance={})
    return Packed(folder / "full", folder / "model", batches)


def test_a_block_is_loaded_from_its_shard_alone(packed: Packed, case: tuple[str, QuantSpec]) -> None:
    """The shard has the names of the published files, which are not those of the modules."""
    opened, whole = open_model(packed.full, arch_for(case[0])), eqat_mm.load(packed.folder)
    name, block = opened.block_name(0), opened.blocks[0]
    shard = CheckpointWriter(packed.folder, opened, case[1]).shard(0)
    load_block(shard, opened, name, block, case[1], torch.device("cpu"))
    expected = whole.get_submodule(name).state_dict()
    assert all(torch.equal(block.state_dict()[key], value) for key, value in expected.items())


def test_only_linears_of_the_tower_are_packed(packed: Packed) -> None:
    model = eqat_mm.load(packed.folder)
    inside = [path for path, module in model.named_modules() if isinstance(module, PackedLinear)]
    assert len(inside) == 14
    assert all(path.startswith(TOWER) for path in inside)
    assert [path for path, parameter in model.named_parameters() if parameter.requires_grad] == [
        f"{path}.weight_scale" for path in inside
    ]
    dense = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {path.split(".")[1] for path in dense - {"lm_head"}} == {"vision_tower", "multi_modal_projector"}
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_everything_else_is_as_published(packed: Packed) -> None:
    before, after = tensors_of(packed.full), tensors_of(packed.folder)
    kept = before.keys() & after.keys()
    gone = {name.removesuffix(".weight") for name in before.keys() - kept}
    assert len(gone) == 14
    assert {name.rpartition(".")[0] for name in after.keys() - kept} == gone
    assert all(name.startswith("language_model.model.layers.") for name in gone)
    assert all(same_bytes(before[name], after[name]) for name in kept)
    assert "vision_tower.vision_model.embeddings.class_embedding" in kept


def test_the_config_ignores_all_but_the_tower(packed: Packed) -> None:
    entry = read_json(packed.folder / "config.json")["quantization_config"]
    assert entry["ignore"] == ["re:.*vision_tower.*", "re:.*multi_modal_projector.*", "re:.*lm_head.*"]
    before, after = read_json(packed.full / "config.json"), read_json(packed.folder / "config.json")
    for part in ("text_config", "vision_config"):
        assert before.pop(part).items() <= after.pop(part).items()
    assert before.items() <= after.items()


def test_the_processor_comes_along(packed: Packed) -> None:
    files = {path.name for path in packed.full.iterdir() if path.suffix != ".safetensors"}
    assert {"processor_config.json", "tokenizer.json", "chat_template.jinja"} <= files
    for name in files - {"config.json"}:
        assert (packed.full / name).read_bytes() == (packed.folder / name).read_bytes()
    processor = transformers.AutoProcessor.from_pretrained(packed.folder)
    image = torch.randint(0, 256, (3, 24, 40), dtype=torch.uint8)
    inputs = processor(images=[image], text=["w5 <image> w6"], return_tensors="pt")
    logits = logits_of(eqat_mm.load(packed.folder), inputs)
    assert logits.shape == (1, inputs["input_ids"].shape[1], 97)
    assert logits.isfinite().all()


def test_transformers_reads_the_same_model(case: tuple[str, QuantSpec], packed: Packed) -> None:
    for inputs in packed.batches:
        assert_read_alike(packed.folder, case[1], inputs)


def test_transformers_generates_as_we_do_and_saves_what_it_reads(packed: Packed, tmp_path: Path) -> None:
    inputs = next(batch for batch in packed.batches if "pixel_values" in batch)
    ours, theirs = eqat_mm.load(packed.folder), foreign(packed.folder)
    assert torch.equal(answers(theirs, inputs), answers(ours, inputs))
    logits = logits_of(theirs, inputs)
    theirs.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits_of(again, inputs), logits)


def answers(model: Any, inputs: Inputs) -> torch.Tensor:
    made: torch.Tensor = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    return made


@pytest.mark.parametrize("case", CASES[:1], ids=["llava"], indirect=True)
def test_a_process_without_this_package_reads_it(packed: Packed, tmp_path: Path) -> None:
    inputs = packed.batches[0]
    logits = logits_of_a_stranger(packed.folder, "AutoModelForImageTextToText", inputs, tmp_path)
    assert torch.equal(logits, logits_of(foreign(packed.folder), inputs))


def test_a_tied_head_is_stored_once_and_tied_again(tmp_path: Path) -> None:
    spec = QuantSpec(3, 32)
    batches = save_tiny_llava(tmp_path / "full", tie_word_embeddings=True)
    run_rtn(open_model(tmp_path / "full", arch_for("llava")), spec, tmp_path, source="tiny", provenance={})
    assert not [name for name in tensors_of(tmp_path / "model") if "lm_head" in name]
    model = eqat_mm.load(tmp_path / "model")
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert_read_alike(tmp_path / "model", spec, batches[0])
    save_like(model, tmp_path / "tuned", tmp_path / "model", "e2e-qp", {})
    assert tensors_of(tmp_path / "tuned").keys() == tensors_of(tmp_path / "model").keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("projector", [False, True], ids=["scales", "scales+projector"])
def test_training_leaves_the_vision_tower_byte_for_byte(
    packed: Packed, tmp_path: Path, dtype: torch.dtype, projector: bool
) -> None:
    """Also where the model was loaded in another dtype than the float16 that is stored."""
    model = eqat_mm.load(packed.folder, dtype=dtype)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if projector:
        trained += [name for name, _ in model.named_parameters() if ".multi_modal_projector." in name]
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).mul_(1.25)
    save_like(model, tmp_path / "tuned", packed.folder, "e2e-qp", {})
    before, after = tensors_of(packed.folder), tensors_of(tmp_path / "tuned")
    assert before.keys() == after.keys()
    changed = {name for name in before if not same_bytes(before[name], after[name])}
    assert {name.split(".")[0] for name in changed} == {"language_model", *(["multi_modal_projector"] * projector)}
    assert len(changed) == len(trained)
    again = eqat_mm.load(tmp_path / "tuned", dtype=dtype)
    assert_close(again.get_parameter(trained[-1]), model.get_parameter(trained[-1]), "elementwise", torch.bfloat16)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("images", [False, True], ids=["text", "images"])
def test_block_ap_fits_the_tower_and_nothing_else(arch: str, images: bool, tmp_path: Path) -> None:
    batches = [batch for batch in save_tiny_llava(tmp_path / "full", arch) if ("pixel_values" in batch) is images]
    opened = open_model(tmp_path / "full", arch_for(arch))
    config = BlockAPConfig(QuantSpec(2, 32), fit=FitConfig(epochs=2, validation_samples=1), precision="float32")
    run_block_ap(
        opened, batches, config, tmp_path, device=torch.device("cpu"), source="tiny", provenance={"config": {}}
    )
    before, after = tensors_of(tmp_path / "full"), tensors_of(tmp_path / "model")
    kept = before.keys() & after.keys()
    changed = {name for name in kept if not same_bytes(before[name], after[name])}
    assert all(name.startswith("language_model.model.layers.") and "norm" in name for name in changed)
    logits = logits_of(eqat_mm.load(tmp_path / "model"), batches[0])
    full = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "full", dtype=torch.float32)
    assert logits.isfinite().all()
    assert (logits - logits_of(full, batches[0])).pow(2).mean() < logits_of(full, batches[0]).pow(2).mean()
