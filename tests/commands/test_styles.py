"""How a LLaVA is addressed: decided once, kept in checkpoints, the same in training, `generate` and tasks."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from eqat_eval import generation
from eqat_mm.checkpoint.folders import load_processor
from eqat_mm.checkpoint.speaker import load_speaker, restyled, style_digest
from eqat_mm.checkpoint.verify import verify_checkpoint
from eqat_mm.cli import parse_job
from eqat_mm.commands.plumbing.samples import image_text_samples
from eqat_mm.commands.verbs.evaluate import EvalJob, evaluate
from eqat_mm.commands.verbs.generate import GenerateJob, generate
from eqat_mm.commands.verbs.quantize import RTNJob, rtn
from eqat_mm.commands.verbs.tune import E2EQPJob, e2e_qp
from eqat_mm.data.image_text.settings import ImageTextData
from eqat_mm.data.image_text.style import Style, template_text
from eqat_mm.errors import ConfigError, EqatError
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json, write_json
from tests.checkpoint.files import assert_four_lines
from tests.commands.jobs import SIX_STEPS
from tests.data.tiny_processor import VICUNA
from tests.tiny_llava import save_tiny_llava

ARCHS = ["llava", "llava_next"]
QUESTION = "w5 w6\n<image>\nw7"


def as_on_the_hub(folder: Path, arch: str) -> Path:
    """A tiny LLaVA with the conversation of the hub's folders."""
    save_tiny_llava(folder, arch, dtype=torch.float32)
    (folder / "chat_template.jinja").write_text(VICUNA, encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=ARCHS)
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def place(arch: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LLaVA `full`, packed in `rtn/model`, and with records about images that are no squares."""
    place = tmp_path_factory.mktemp(arch)
    as_on_the_hub(place / "full", arch)
    rtn(RTNJob(model=str(place / "full"), output=place / "rtn", quant=QuantSpec(4, 32)))
    rows = []
    for number in range(4):
        Image.linear_gradient("L").resize((40 + number, 16)).convert("RGB").save(place / f"{number}.png")
        turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "w10 w11"}]
        rows.append({"image": f"{number}.png", "conversations": turns})
    write_json(place / "records.json", rows)
    return place


def tuned(place: Path, output: Path, **data: Any) -> Path:
    """E2E-QP of one step on the records."""
    conversations = ImageTextData(source=str(place / "records.json"), max_length=500, **data)
    given = SIX_STEPS | {"max_steps": 1, "batch_size": 2, "conversations": conversations}
    more: dict[str, Any] = {"precision": "float32", "device": "cpu", "recipe_for": (str(place / "full"),)}
    return e2e_qp(
        E2EQPJob(model=str(place / "full"), quantized=place / "rtn" / "model", output=output, **given, **more)
    )


def spoken(folder: Path) -> tuple[Any, Any, Any]:
    processor = load_processor(folder)
    images: Any = processor.image_processor
    return processor.chat_template, type(images).__name__, getattr(images, "do_pad", None)


def test_a_packed_checkpoint_is_addressed_as_its_model_was_trained(place: Path, arch: str) -> None:
    template, images, pads = spoken(place / "rtn" / "model")
    assert template == template_text("vicuna_v1")
    expected = ("LlavaImageProcessor", True) if arch == "llava" else spoken(place / "full")[1:]
    assert (images, pads) == expected
    verify_checkpoint(place / "rtn" / "model")
    assert restyled(place / "rtn" / "model") == {}
    speakers = [load_speaker(place / "full"), load_speaker(place / "rtn" / "model")]
    assert len({style_digest(speaker) for speaker in speakers}) == 1


def test_what_is_chosen_is_said(place: Path, arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    load_speaker(place / "full")
    said = capsys.readouterr().out
    assert "template vicuna_v1" in said
    assert ("images pad" in said) == (arch == "llava")
    load_speaker(place / "full", Style("vicuna_v1", "model"))
    load_speaker(place / "rtn" / "model")
    assert capsys.readouterr().out == ""


def inputs_of_training(folder: Path, place: Path, **data: Any) -> dict[str, torch.Tensor]:
    config = ImageTextData(source=str(place / "records.json"), max_length=500, **data)
    sample = image_text_samples(folder, config, 2, place / "problems").dataset[0]
    first = int((sample["labels"] != -100).nonzero()[0])
    return {name: value[None, :first] if value.dim() == 1 else value for name, value in sample.items()}


def inputs_of(module: Any, monkeypatch: pytest.MonkeyPatch, run: Any) -> dict[str, torch.Tensor]:
    """What the model is given."""
    seen: list[dict[str, torch.Tensor]] = []

    def watched(model: Any, inputs: Any, settings: Any, streamer: Any = None) -> torch.Tensor:
        seen.append(dict(inputs))
        return torch.cat([inputs["input_ids"], inputs["input_ids"][:, :1]], dim=1)

    monkeypatch.setattr(module, "generated", watched)
    run()
    return seen[0]


def inputs_of_lmms_eval(folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch, **style: Any) -> Any:
    from eqat_eval import lmms_model

    model = lmms_model.EqatVLM(str(folder), device="cpu", **style)
    samples = [(model.prompt(QUESTION, 1), [Image.open(place / "0.png")])]
    return inputs_of(lmms_model, monkeypatch, lambda: model.generate(samples, {"max_new_tokens": 1}))


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="needs lmms-eval")
@pytest.mark.filterwarnings("ignore")  # lmms-eval 0.7.3 warns of much; 2026-11-27
@pytest.mark.parametrize("folder", ["full", "rtn/model"])
@pytest.mark.parametrize("template", ["auto", "vicuna_v1", "llava_hf", "model"])
def test_training_generate_and_tasks_see_the_same(
    place: Path, monkeypatch: pytest.MonkeyPatch, folder: str, template: str
) -> None:
    style = {"template": template}
    trained = inputs_of_training(place / folder, place, **style)
    job = GenerateJob(str(place / folder), QUESTION, [str(place / "0.png")], device="cpu", cuda_graph=False, **style)  # type: ignore[arg-type]
    written = inputs_of(generation, monkeypatch, lambda: generate(job))
    judged = inputs_of_lmms_eval(place / folder, place, monkeypatch, **style)
    for name in ("input_ids", "pixel_values"):
        for other in (written, judged):
            assert torch.equal(trained[name], other[name]), name


@pytest.mark.parametrize("arch", ["llava"], indirect=True)
@pytest.mark.parametrize("images", ["crop", "pad"])
def test_a_run_keeps_what_it_used(place: Path, tmp_path: Path, images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine.jinja"
    mine.write_text(template_text("llava_hf"), encoding="utf-8")
    folder = tuned(place, tmp_path / "run", template=str(mine), images=images)
    mine.unlink()
    assert spoken(folder) == (template_text("llava_hf"), "LlavaImageProcessor", images == "pad")
    verify_checkpoint(folder)
    trained = inputs_of_training(folder, place)
    job = GenerateJob(str(folder), QUESTION, [str(place / "0.png")], device="cpu", cuda_graph=False)
    written = inputs_of(generation, monkeypatch, lambda: generate(job))
    for name in ("input_ids", "pixel_values"):
        assert torch.equal(trained[name], written[name])
    other = inputs_of_training(place / "rtn" / "model", place)
    assert not torch.equal(trained["input_ids"], other["input_ids"])
    assert torch.equal(trained["pixel_values"], other["pixel_values"]) == (images == "pad")


def test_a_run_without_a_word_keeps_the_checkpoints_own(place: Path, tmp_path: Path) -> None:
    assert spoken(tuned(place, tmp_path / "run")) == spoken(place / "rtn" / "model")


@pytest.mark.parametrize("arch", ["llava"], indirect=True)
def test_a_run_goes_on_with_the_template_that_it_began_with(place: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jinja"
    mine.write_text(template_text("llava_hf"), encoding="utf-8")
    tuned(place, tmp_path / "run", template=str(mine))
    mine.write_text(template_text("vicuna_v1"), encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        tuned(place, tmp_path / "run", template=str(mine))
    assert_four_lines(raised.value)


@pytest.mark.parametrize("style", [{"template": "vicuna_v2"}, {"template": "missing.jinja"}], ids=str)
def test_a_template_that_is_none_is_refused_before_anything(place: Path, tmp_path: Path, style: Any) -> None:
    with pytest.raises(EqatError) as raised:
        tuned(place, tmp_path / "run", **style)
    assert_four_lines(raised.value)
    assert "template" in raised.value.where or "missing.jinja" in raised.value.where
    assert not (tmp_path / "run").exists()


def test_the_options_have_one_name_everywhere(tmp_path: Path) -> None:
    mine = tmp_path / "mine.jinja"
    mine.write_text("mine", encoding="utf-8")
    words = ["--template", str(mine), "--images", "crop"]
    for command in ("generate", "chat", "eval"):
        job = parse_job(command, ["--model", "demo-llava", *words])
        assert (job.template, job.images) == (str(mine), "crop")
    words = ["--conversations.template", str(mine), "--conversations.images", "crop"]
    trained: E2EQPJob = parse_job("e2e-qp", ["--model", "demo-llava", *words])
    assert trained.conversations is not None
    assert trained.conversations.style == Style(str(mine), "crop")


@pytest.mark.parametrize("option", [{"template": "vicuna_v1"}, {"images": "pad"}], ids=str)
def test_text_is_judged_without_a_style(place: Path, option: Any) -> None:
    with pytest.raises(ConfigError, match="--tasks") as raised:
        evaluate(EvalJob(str(place / "full"), device="cpu", **option))
    assert_four_lines(raised.value)


# ---- folders of older layouts ----------------------------------------------------------------------


@pytest.fixture
def older(place: Path, tmp_path: Path) -> Path:
    """The full-precision folder as the hub has it: template and images in JSON files of their own."""
    folder = Path(shutil.copytree(place / "full", tmp_path / "older"))
    whole = read_json(folder / "processor_config.json")
    kind = type(load_processor(folder)).__name__
    write_json(folder / "preprocessor_config.json", whole.pop("image_processor") | {"processor_class": kind})
    write_json(folder / "processor_config.json", whole)
    (folder / "chat_template.jinja").unlink()
    write_json(folder / "chat_template.json", {"chat_template": VICUNA})
    return folder


def test_an_older_folder_becomes_the_same(place: Path, older: Path, tmp_path: Path) -> None:
    folder = rtn(RTNJob(model=str(older), output=tmp_path / "rtn", quant=QuantSpec(4, 32)))
    assert spoken(folder) == spoken(place / "rtn" / "model")
    assert not (folder / "chat_template.json").exists()
    verify_checkpoint(folder)


def test_a_template_in_the_processors_settings_gives_way(place: Path, older: Path) -> None:
    (older / "chat_template.json").unlink()
    write_json(older / "processor_config.json", read_json(older / "processor_config.json") | {"chat_template": VICUNA})
    files = restyled(older)
    assert files["chat_template.jinja"] == template_text("vicuna_v1")
    assert "chat_template" not in str(files["processor_config.json"])


def test_a_model_without_a_processor_is_packed_as_before(place: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(place / "full", tmp_path / "mute"))
    for path in [*folder.glob("*processor_config.json"), *folder.glob("chat_template*")]:
        path.unlink()
    assert restyled(folder) == {}
    with pytest.raises(EqatError):
        restyled(folder, Style("vicuna_v1"))
