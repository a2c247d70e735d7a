"""What users type for LLaVA: the recipe that is taken, and what is said where something is missing."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from eqat_mm.cli import parse_job
from eqat_mm.commands.quantize import BlockAPJob, RTNJob, rtn
from eqat_mm.commands.recipes import fitting_recipe, recipes
from eqat_mm.commands.runs import default_output
from eqat_mm.commands.tune import E2EQPJob, e2e_qp
from eqat_mm.errors import CheckpointError, DataError
from eqat_mm.quant.spec import QuantSpec
from tests.checkpoint.files import assert_four_lines
from tests.tiny_llava import save_tiny_llava

LLAVAS = ["llava-1.5-7b", "llava-1.5-13b", "llava-v1.6-mistral-7b", "llava-v1.6-vicuna-7b"]


def e2e_qp_job(*words: str) -> E2EQPJob:
    job: E2EQPJob = parse_job("e2e-qp", E2EQPJob, words)
    return job


@pytest.mark.parametrize("model", LLAVAS)
def test_a_model_alone_takes_the_2_bit_recipe(model: str) -> None:
    job = e2e_qp_job("--model", model)
    assert job.model == model
    assert model in job.recipe_for
    assert job.quant == QuantSpec(2, 64)
    assert job.deepspeed == "zero-2"
    assert job.trains == "scales+projector"
    assert job.conversations is not None
    assert Path(job.conversations.source).name == "llava_v1_5_mix665k.json"


@pytest.mark.parametrize(("bits", "rate"), [(2, 3e-5), (3, 3e-5), (4, 2e-5)])
@pytest.mark.parametrize("group", [64, 128])
def test_bits_and_group_size_choose_the_recipe(bits: int, rate: float, group: int) -> None:
    words = ["--model", "llava-1.5-13b", "--quant.bits", str(bits), "--quant.group_size", str(group)]
    job = e2e_qp_job(*words)
    assert job.quant == QuantSpec(bits, group)
    assert job.learning_rate == rate
    for command in ("block-ap", "e2e-qp"):
        assert fitting_recipe(command, "llava-1.5-13b", str(bits), str(group)) == f"llava-1.5-w{bits}g{group}-{command}"


def test_a_group_size_without_a_recipe_takes_the_smallest_one_that_has() -> None:
    assert fitting_recipe("e2e-qp", "llava-1.5-7b", "2", "32") == "llava-1.5-w2g64-e2e-qp"
    assert fitting_recipe("e2e-qp", "llava-1.5-7b", "5") is None


def test_every_recipe_has_its_other_stage() -> None:
    for name in recipes():
        if name.startswith("llava-"):
            stem = name.removesuffix("-block-ap").removesuffix("-e2e-qp")
            assert {f"{stem}-block-ap", f"{stem}-e2e-qp"} <= recipes().keys()


@pytest.mark.parametrize("words", [[], ["--quant.bits", "3", "--quant.group_size", "128"]], ids=["w2g64", "w3g128"])
def test_without_block_ap_the_message_has_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    job = e2e_qp_job("--model", "llava-1.5-13b", *words)
    with pytest.raises(CheckpointError) as raised:
        e2e_qp(job)
    assert_four_lines(raised.value)
    command = shlex.split(raised.value.do.removeprefix("make it first: ").partition(", or ")[0])
    assert command[:2] == ["eqat", "block-ap"]
    other: BlockAPJob = parse_job("block-ap", BlockAPJob, command[2:])
    assert (other.model, other.quant) == (job.model, job.quant)
    assert "llava-1.5-13b" in other.recipe_for
    assert raised.value.where == f"--quantized {default_output(job.model, job.quant) / 'block-ap' / 'model'}"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA, packed."""
    folder = tmp_path_factory.mktemp("packed")
    save_tiny_llava(folder / "llava", dtype=torch.float32)
    return rtn(RTNJob(model=str(folder / "llava"), output=folder / "rtn", quant=QuantSpec(2, 32)))


def test_without_instructions_the_message_has_the_command_that_fetches_them(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as raised:
        e2e_qp(e2e_qp_job("--model", "llava-1.5-13b", "--quantized", str(packed)))
    assert_four_lines(raised.value)
    assert raised.value.where == "--conversations.source data/llava_v1_5_mix665k.json"
    assert raised.value.do.startswith(
        "hf download liuhaotian/LLaVA-Instruct-150K llava_v1_5_mix665k.json --repo-type dataset --local-dir data"
    )
    assert not any(tmp_path.iterdir())


def test_without_images_the_message_names_the_folder(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/llava_v1_5_mix665k.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match=r"docs/llava\.md") as raised:
        e2e_qp(e2e_qp_job("--model", "llava-1.5-13b", "--quantized", str(packed)))
    assert_four_lines(raised.value)
    assert raised.value.where == "--conversations.image_folder data/llava-images"
