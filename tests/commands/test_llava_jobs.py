"""What users type for LLaVA: the recipe that is taken, and what is said where something is missing."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch

from eqat_mm.cli import main, parse_job
from eqat_mm.commands.line.recipes import fitting_recipe
from eqat_mm.commands.plumbing.runs import default_output
from eqat_mm.commands.verbs.quantize import BlockAPJob, RTNJob, rtn
from eqat_mm.commands.verbs.tune import E2EQPJob, e2e_qp
from eqat_mm.errors import CheckpointError, ConfigError, DataError
from eqat_mm.quant.spec import QuantSpec
from tests.checkpoint.files import assert_four_lines
from tests.tiny_llava import save_tiny_llava

LLAVAS = ["llava-1.5-7b", "llava-1.5-13b", "llava-v1.6-mistral-7b", "llava-v1.6-vicuna-7b"]


def e2e_qp_job(*words: str) -> E2EQPJob:
    job: E2EQPJob = parse_job("e2e-qp", words)
    return job


@pytest.mark.parametrize("model", LLAVAS)
def test_a_model_alone_takes_the_2_bit_recipe(model: str) -> None:
    job = e2e_qp_job("--model", model)
    assert job.model == model
    assert job.recipe_for[0] in ("llava-1.5", "llava-next")
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
        recipe = fitting_recipe(command, "llava-1.5-13b", str(bits), group)
        assert recipe is not None
        assert recipe.name == f"llava-1.5-w{bits}g{group}-{command}"


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
    other: BlockAPJob = parse_job("block-ap", command[2:])
    assert (other.model, other.quant) == (job.model, job.quant)
    assert other.recipe_for == ("llava-1.5",)
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


# ---- text in silence --------------------------------------------------------------------------------


def test_a_model_that_sees_is_not_trained_on_text_unless_asked(packed: Path, tmp_path: Path) -> None:
    model = str(packed.parents[1] / "llava")
    known = ["--recipe_for", json.dumps([model, "no-such"]), "--quantized", str(packed)]
    data = [*known, "--data.source", "t.txt", "--output", str(tmp_path / "run")]
    with pytest.raises(ConfigError) as raised:
        e2e_qp(e2e_qp_job("--model", model, *data))
    assert_four_lines(raised.value)
    assert "--text_only" in raised.value.do
    with pytest.raises(DataError, match=r"t\.txt"):
        e2e_qp(e2e_qp_job("--model", model, *data, "--text_only"))
    with pytest.raises(DataError, match="mix665k"):  # the name of a model does not matter, nor what it cannot say
        e2e_qp(e2e_qp_job("--model", "no-such", *known, "--conversations.source", "mix665k.json"))
    with pytest.raises(ConfigError, match=r"--conversations\.source"):
        e2e_qp(e2e_qp_job("--model", "no-such", *data))


def test_text_beside_the_conversations_of_a_recipe_is_not_one_in_silence(tmp_path: Path) -> None:
    job = e2e_qp_job("--model", "llava-1.5-7b", "--data.source", "t.txt", "--output", str(tmp_path))
    with pytest.raises(ConfigError) as raised:
        e2e_qp(job)
    assert "t.txt and data/llava_v1_5_mix665k.json" in raised.value.given


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["block-ap", "mistral-7b"], "--calibration.source"),
        (["e2e-qp", "mistral-7b"], "--data.source"),
        (["llm-qat", "mistral-7b"], "--data.source"),
        (["eval", "mistral-7b"], "--data.source"),
    ],
)
def test_no_text_is_not_the_text_of_the_demo(
    words: list[str], option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"name one with {option}" in said
    assert "hf:DKYoon/SlimPajama-6B" in said
