"""Tasks as small files of step sizes: saved, switched in place, refused by another base, written as whole folders."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import eqat_mm
from eqat_mm import adapters
from eqat_mm.checkpoint import verify_checkpoint
from eqat_mm.checkpoint.adapters import add_adapters
from eqat_mm.checkpoint.step_sizes import FILE
from eqat_mm.cli import main
from eqat_mm.errors import CheckpointError, ConfigError
from tests.api.conftest import STEPS, WINDOWS, Seeing, logits_of, quantized
from tests.checkpoint.files import assert_four_lines, same_weights
from tests.tiny_model import Tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*these settings are", "ignore:`is_gradient_checkpointing`")

SEEING: dict[str, Any] = {
    "bits": 4,
    "group_size": 32,
    "quiet": True,
    "settings": {"calibration": {"length": 16, "count": 4}, "fit": {"epochs": 0, "validation_samples": 1}},
}


@pytest.fixture(scope="module")
def runs(tiny: Tiny, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs of E2E-QP from one base, with other learning rates."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, rate in {"shapes": 2e-3, "colours": 8e-3}.items():
        settings = STEPS | WINDOWS | {"learning_rate": rate}
        eqat_mm.tune(packed, text=tiny.text, output=folder / name, quiet=True, settings=settings)
    return {name: folder / name for name in ("shapes", "colours")}


@pytest.fixture(scope="module")
def tasks(runs: dict[str, Path]) -> dict[str, Path]:
    """The two as files, made by the command."""
    made = {name: run.with_name(f"{name}.safetensors") for name, run in runs.items()}
    for name, run in runs.items():
        assert main(["adapter", "save", str(run), "--output", str(made[name])]) == 0
    return made


def test_a_task_is_small_and_holds_step_sizes_alone(
    runs: dict[str, Path], tasks: dict[str, Path], packed: Path
) -> None:
    tensors = load_file(tasks["shapes"])
    assert len(tensors) == 14
    assert all(name.endswith(".weight_scale") and tensor.dtype is torch.bfloat16 for name, tensor in tensors.items())
    whole = sum(path.stat().st_size for path in (packed / "model").glob("*.safetensors"))
    assert sum(tensor.nbytes for tensor in tensors.values()) < whole / 8


def test_switched_in_place(runs: dict[str, Path], tasks: dict[str, Path], packed: Path) -> None:
    model = eqat_mm.load(packed)
    base, places = logits_of(model), [parameter.data_ptr() for parameter in model.parameters()]
    assert [adapters.add(model, tasks[name]) for name in tasks] == adapters.names(model) == ["shapes", "colours"]
    assert torch.equal(logits_of(model), base)
    wanted = {name: logits_of(eqat_mm.load(run)) for name, run in runs.items()}
    assert not torch.equal(wanted["shapes"], wanted["colours"])
    for name in ("shapes", "colours", "shapes"):
        adapters.switch(model, name)
        assert torch.equal(logits_of(model), wanted[name])
        assert adapters.active(model) == name
    adapters.switch(model, None)
    assert torch.equal(logits_of(model), base)
    assert adapters.active(model) is None
    assert [parameter.data_ptr() for parameter in model.parameters()] == places


def test_generation_with_a_static_cache_follows_a_switch(tasks: dict[str, Path], packed: Path) -> None:
    model: Any = eqat_mm.load(packed)
    adapters.add(model, tasks["colours"], "loud")
    asked = {"inputs": torch.arange(2, 9)[None], "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    before = model.generate(**asked, cache_implementation="static")
    adapters.switch(model, "loud")
    assert torch.equal(model.generate(**asked, cache_implementation="static"), model.generate(**asked))
    adapters.switch(model, None)
    assert torch.equal(model.generate(**asked, cache_implementation="static"), before)


def test_a_task_of_one_run_goes_on_another_of_the_same_base(runs: dict[str, Path], tasks: dict[str, Path]) -> None:
    model = eqat_mm.load(runs["colours"])
    adapters.add(model, tasks["shapes"])
    adapters.switch(model, "shapes")
    assert torch.equal(logits_of(model), logits_of(eqat_mm.load(runs["shapes"])))


def test_what_is_trained_after_a_switch_is_saved(tasks: dict[str, Path], packed: Path, tmp_path: Path) -> None:
    model = eqat_mm.load(packed)
    adapters.add(model, tasks["shapes"])
    adapters.switch(model, "shapes")
    with torch.no_grad():
        for parameter in eqat_mm.train_only(model):
            parameter.mul_(1.25)
    moved = logits_of(model)
    assert adapters.save(model, tmp_path / "mine") == tmp_path / "mine" / FILE
    again = copy.deepcopy(eqat_mm.load(packed))
    assert adapters.add(again, tmp_path / "mine") == "mine"
    adapters.switch(again, "mine")
    assert torch.allclose(logits_of(again), moved, atol=0.05 * moved.abs().max().item())
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits_of(again), logits_of(eqat_mm.load(tmp_path / "whole")))


def test_applied_it_is_the_run_again(
    runs: dict[str, Path], tasks: dict[str, Path], packed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "whole"
    assert main(["adapter", "apply", str(packed), str(tasks["shapes"]), "--output", str(output)]) == 0
    assert same_weights(runs["shapes"] / "model", output)
    manifest, run = verify_checkpoint(output), verify_checkpoint(runs["shapes"] / "model")
    assert manifest.stage == run.stage == "e2e-qp"
    assert manifest.provenance[:-1] == run.provenance
    assert manifest.provenance[-1]["command"] == "adapter apply"
    assert main(["adapter", "apply", str(packed), str(tasks["shapes"]), "--output", str(output)]) == 2


def test_listed(
    tasks: dict[str, Path], packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["adapter", "list", *map(str, tasks.values())]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [str(path) for path in tasks.values()]
    assert all("e2e-qp, llama w2g32 from" in line and "14 linears, " in line for line in lines)
    assert main(["adapter", "list", str(tasks["shapes"].parent)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    monkeypatch.chdir(tasks["shapes"].parent)
    assert main(["adapter", "list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["adapter", "list", str(packed / "model")]) == 2


def test_other_integers_are_refused(
    tiny: Tiny, tasks: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantized(tiny, tmp_path / "other", seed=7, quiet=True)
    with pytest.raises(CheckpointError, match=r"other integers in model\.layers\.0.* and \d+ more") as raised:
        adapters.add(eqat_mm.load(tmp_path / "other"), tasks["shapes"])
    assert_four_lines(raised.value)
    words = ["adapter", "apply", str(tmp_path / "other"), str(tasks["shapes"]), "--output", str(tmp_path / "whole")]
    assert main(words) == 2
    assert "other integers in model.layers.0" in capsys.readouterr().err
    assert not (tmp_path / "whole").exists()


@torch.no_grad()
def test_another_norm_is_refused(tasks: dict[str, Path], packed: Path, tmp_path: Path) -> None:
    model: Any = eqat_mm.load(packed)
    model.model.norm.weight.mul_(2)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight") as raised:
        adapters.save(model, tmp_path / "mine")
    assert_four_lines(raised.value)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"other values in model\.norm\.weight"):
        adapters.add(eqat_mm.load(tmp_path / "other"), tasks["shapes"])


def test_files_that_are_none(tasks: dict[str, Path], packed: Path, tmp_path: Path) -> None:
    model, file = eqat_mm.load(packed), tmp_path / "bad.safetensors"
    good = tasks["shapes"].read_bytes()
    flipped = bytes([good[-1] ^ 1])
    facts = good.replace(b'"arch\\": \\"llama\\"', b'"arch\\": \\"llamb\\"', 1)
    assert facts != good
    weights = next((packed / "model").glob("*.safetensors")).read_bytes()
    for content in (good[:-1] + flipped, good[:-9], good[:40], b"", facts, weights):
        file.write_bytes(content)
        with pytest.raises(CheckpointError) as raised:
            adapters.add(model, file)
        assert_four_lines(raised.value)
    with pytest.raises(CheckpointError, match="no such file"):
        adapters.add(model, tmp_path / "nowhere")
    assert adapters.names(model) == []


def test_what_python_may_not_be_given(tiny: Tiny, tasks: dict[str, Path], packed: Path, tmp_path: Path) -> None:
    dense = transformers.AutoModelForCausalLM.from_pretrained(tiny.folder)
    with pytest.raises(ConfigError, match=r"eqat_mm\.load"):
        adapters.add(dense, tasks["shapes"])
    model = eqat_mm.load(packed)
    adapters.add(model, tasks["shapes"])
    with pytest.raises(ConfigError, match="did you mean shapes") as raised:
        adapters.switch(model, "shape")
    assert_four_lines(raised.value)
    with pytest.raises(ConfigError, match="projector"):
        adapters.save(model, tmp_path / "x", projector=True)


@pytest.mark.parametrize(
    "words",
    [["save"], ["save", "a", "b", "--output", "x"], ["apply", "a", "--output", "x"], ["save", "a"],
     ["list", "a", "--output", "x"], ["apply", "a", "b"]],
)  # fmt: skip
def test_an_action_without_what_it_needs(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapter", *words]) == 2
    assert f"eqat adapter {words[0]}" in capsys.readouterr().err


def test_low_rank_adapters_are_no_step_sizes(tasks: dict[str, Path], packed: Path, tmp_path: Path) -> None:
    model = eqat_mm.load(packed)
    add_adapters(model, rank=2, alpha=4, seed=0)
    with pytest.raises(ConfigError, match="low-rank"):
        adapters.save(model, tmp_path / "x")
    adapters.add(model, tasks["shapes"])  # they may lie beside
    before = logits_of(model)
    adapters.switch(model, "shapes")
    assert not torch.equal(logits_of(model), before)


def test_a_llava_with_its_projector_and_its_template(seeing: Seeing, tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    eqat_mm.quantize(seeing.folder, text=seeing.text, output=base, **SEEING)
    given: dict[str, Any] = {"conversations": seeing.conversations, "train_projector": True, "quiet": True}
    template = tmp_path / "mine.jinja"
    stored = json.loads((base / "model" / "tokenizer_config.json").read_text()).get("chat_template")
    text = stored or (base / "model" / "chat_template.jinja").read_text()
    template.write_text(text + "{# mine #}")
    tuned = eqat_mm.tune(
        base, output=run, settings=STEPS | {"conversations": {"max_length": 400, "template": str(template)}}, **given
    )
    task = tmp_path / "task.safetensors"
    assert main(["adapter", "save", str(run), "--output", str(task)]) == 0
    names = set(load_file(task))
    assert {name for name in names if "projector" in name} == {
        name for name in tuned.state_dict() if "multi_modal_projector" in name
    }
    model = eqat_mm.load(base)
    inputs = inputs_of(model)
    plain = logits(model, inputs)
    adapters.add(model, task)
    adapters.switch(model, "task")
    assert torch.equal(logits(model, inputs), logits(tuned, inputs))
    adapters.switch(model, None)
    assert torch.equal(logits(model, inputs), plain)
    assert main(["adapter", "apply", str(base), str(task), "--output", str(tmp_path / "whole")]) == 0
    assert same_weights(run / "model", tmp_path / "whole")
    for name in ("chat_template.jinja", "processor_config.json"):
        assert (tmp_path / "whole" / name).read_text() == (run / "model" / name).read_text()
    assert "{# mine #}" in (tmp_path / "whole" / "chat_template.jinja").read_text()
    scales_alone = tmp_path / "scales.safetensors"
    adapters.save(eqat_mm.load(base), scales_alone)
    with pytest.raises(CheckpointError, match=r"other values in .*projector"):
        adapters.add(eqat_mm.load(run), scales_alone)


def inputs_of(model: Any) -> dict[str, Tensor]:
    token, size = model.config.image_token_id, model.config.vision_config.image_size
    patches = (size // model.config.vision_config.patch_size) ** 2
    tokens = torch.tensor([[1, *[token] * patches, 5, 6, 7]])
    pixels = torch.linspace(-1, 1, 3 * size * size).view(1, 3, size, size)
    return {"input_ids": tokens, "pixel_values": pixels}


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found


def test_a_base_that_is_gone(tasks: dict[str, Path], packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed / "model", tmp_path / "base")
    model = eqat_mm.load(tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    adapters.add(model, tasks["shapes"])  # its integers are in memory
    adapters.switch(model, "shapes")
    with pytest.raises(CheckpointError, match="gone") as raised:
        adapters.save(model, tmp_path / "x")
    assert_four_lines(raised.value)
