"""Conversations, and text among them, as both end-to-end commands learn from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eqat_mm.checkpoint.folders import load_processor, load_tokenizer
from eqat_mm.checkpoint.verify import verify_checkpoint
from eqat_mm.commands.plumbing.end_to_end_job import EndToEndJob
from eqat_mm.commands.plumbing.models import load_model
from eqat_mm.commands.plumbing.samples import samples_of
from eqat_mm.commands.verbs import tune
from eqat_mm.commands.verbs.llm_qat import LLMQATJob, llm_qat
from eqat_mm.commands.verbs.prepare_data import PrepareDataJob, prepare_data
from eqat_mm.commands.verbs.quantize import RTNJob, rtn
from eqat_mm.commands.verbs.tune import E2EQPJob, e2e_qp
from eqat_mm.data.image_text.settings import ImageTextData
from eqat_mm.data.image_text.style import template_text
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.errors import ConfigError, DataError, EqatError
from eqat_mm.train.llm_qat import prepare
from llava_adapters import arch_for
from tests.checkpoint.files import assert_four_lines, same_weights, tensors_of
from tests.commands.jobs import SIX_STEPS, SPEC
from tests.tiny_llava import save_tiny_llava
from tests.tiny_model import save_tiny
from tests.train.cases import SAMPLES, save_conversations
from tests.train.stopping import Stopped, stop_at_step

TEXTS = sum(index % 4 == 0 for index in range(SAMPLES))
"""Conversations without an image."""

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA and a tiny Llama, packed copies of both, conversations and text."""
    folder = tmp_path_factory.mktemp("conversations")
    save_tiny_llava(folder / "llava", dtype=torch.float32)
    save_tiny(folder).folder.rename(folder / "llama")
    for name in ("llava", "llama"):
        rtn(RTNJob(model=str(folder / name), output=folder / f"{name}-rtn", quant=SPEC))
    save_conversations(folder / "mixed.json")
    records = json.loads((folder / "mixed.json").read_text(encoding="utf-8"))
    texts = [record for record in records if "image" not in record] * 4
    (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    return folder


def job_of(kind: type[EndToEndJob], place: Path, output: Path, model: str = "llava", **changes: Any) -> Any:
    """Six steps; on mixed conversations unless something else is said."""
    settings: dict[str, Any] = SIX_STEPS | {"model": str(place / model), "recipe_for": (str(place / model),)}
    settings |= {"output": output, "device": "cpu", "precision": "float32", "held_out_steps": 3}
    settings |= {"conversations": ImageTextData(source=str(place / "mixed.json"))}
    more: dict[str, Any] = {"bits": "4-8-4"}
    if kind is E2EQPJob:
        more = {"quant": SPEC, "quantized": place / f"{model}-rtn" / "model", "loss": "kl"}
    return kind(**(settings | more | changes))


def text_of(place: Path, **changes: Any) -> TextWindows:
    return TextWindows(str(place / "text.txt"), length=16, **changes)


BOTH = pytest.mark.parametrize(("kind", "run"), [(E2EQPJob, e2e_qp), (LLMQATJob, llm_qat)], ids=["e2e-qp", "llm-qat"])


def log_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# ---- LLM-QAT on conversations ---------------------------------------------------------------------


def test_the_language_tower_learns_and_what_sees_stays(place: Path, tmp_path: Path) -> None:
    data = ImageTextData(source=str(place / "mixed.json"), held_out=5)
    made = llm_qat(job_of(LLMQATJob, place, tmp_path / "run", conversations=data, keep_best=True))
    manifest = verify_checkpoint(made)
    assert (manifest.stage, manifest.widths.name) == ("llm-qat", "4-8-4")
    before, after = load_file(place / "llava" / "model.safetensors"), tensors_of(made)
    sees = [name for name in before if "vision" in name or "projector" in name]
    assert len(sees) > 10
    assert all(torch.equal(after[name], before[name]) for name in sees)
    for name in ("language_model.model.embed_tokens.weight", "language_model.model.norm.weight"):
        assert not torch.equal(after[name], before[name])
    judged = [record for record in log_of(tmp_path / "run") if "held_out_loss" in record]
    assert [record["step"] for record in judged] == [0, 3, 6]
    assert 0 < judged[-1]["held_out_kl"] < judged[0]["held_out_kl"]


@pytest.mark.parametrize("loss", ["kl", "cross-entropy"])
def test_the_loss_is_that_of_answers_about_the_same_images(place: Path, tmp_path: Path, loss: Any) -> None:
    """Computed once more, from logits at all places of the first step's batch."""
    job = job_of(LLMQATJob, place, tmp_path / "run", loss=loss, max_steps=1)
    llm_qat(job)
    samples = samples_of(place / "llava", job, tmp_path)
    assert samples.order is not None
    assert samples.collator is not None
    batch = samples.collator([samples.dataset[index] for index in samples.order.indices(0)[:4]])
    labels = batch.pop("labels")
    teacher, student = (load_model(place / "llava", torch.device("cpu")) for _ in range(2))
    prepare(student, arch_for("llava"), job)
    with torch.no_grad():
        wanted, found = (model(**batch, use_cache=False).logits[:, :-1].log_softmax(-1) for model in (teacher, student))
    answers = labels[:, 1:] != -100
    assert 0 < answers.sum() < answers.numel() / 2
    divergence = (wanted.exp() * (wanted - found)).sum(-1)[answers].mean()
    words = -found[answers].gather(-1, labels[:, 1:][answers].unsqueeze(-1)).mean()
    expected = divergence if loss == "kl" else words
    assert log_of(tmp_path / "run")[0]["loss"] == pytest.approx(expected.item(), rel=1e-3)


def test_the_statistics_of_smoothing_are_those_of_images_too(place: Path, tmp_path: Path) -> None:
    plain = llm_qat(job_of(LLMQATJob, place, tmp_path / "plain", max_steps=0))
    for name, source in (("mixed", "mixed.json"), ("texts", "texts.json")):
        data = ImageTextData(source=str(place / source))
        smoothed = llm_qat(
            job_of(LLMQATJob, place, tmp_path / name, max_steps=0, smooth=0.5, smooth_samples=4, conversations=data)
        )
        assert not same_weights(plain, smoothed)
    assert not same_weights(tmp_path / "mixed" / "model", tmp_path / "texts" / "model")


@BOTH
def test_the_checkpoint_keeps_how_it_was_addressed(place: Path, tmp_path: Path, kind: Any, run: Train) -> None:
    data = ImageTextData(source=str(place / "mixed.json"), template="vicuna_v1", images="pad")
    made = run(job_of(kind, place, tmp_path / "run", conversations=data, max_steps=1))
    processor: Any = load_processor(made)
    assert processor.chat_template == template_text("vicuna_v1")
    assert processor.image_processor.do_pad
    verify_checkpoint(made)


@BOTH
def test_records_that_go_while_a_run_is_stopped_are_stood_in_for(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, run: Train
) -> None:
    source = tmp_path / "mixed.json"
    source.write_text((place / "mixed.json").read_text(encoding="utf-8"), encoding="utf-8")
    data = ImageTextData(source=str(source), image_folder=place)
    stop_at_step(monkeypatch, 4)
    with pytest.raises(Stopped):
        run(job_of(kind, place, tmp_path / "run", conversations=data, save_steps=2))
    records = json.loads(source.read_text(encoding="utf-8"))
    source.write_text(json.dumps(records[1:]), encoding="utf-8")
    verify_checkpoint(run(job_of(kind, place, tmp_path / "run", conversations=data, save_steps=2)))


# ---- a language model ------------------------------------------------------------------------------


@BOTH
def test_a_language_model_learns_from_conversations_without_images(
    place: Path, tmp_path: Path, kind: Any, run: Train
) -> None:
    data = ImageTextData(source=str(place / "texts.json"), template="vicuna_v1", held_out=5)
    made = run(job_of(kind, place, tmp_path / "run", "llama", conversations=data))
    judged = [record["held_out_kl"] for record in log_of(tmp_path / "run") if "held_out_kl" in record]
    assert judged[-1] < judged[0]
    assert load_tokenizer(made).chat_template == template_text("vicuna_v1")
    verify_checkpoint(made)


@BOTH
@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"source": "mixed.json", "template": "vicuna_v1"}, "1 images, and this model sees none"),
        ({"source": "texts.json"}, "no chat_template"),
        ({"source": "texts.json", "template": "vicuna_v1", "images": "pad"}, "which sees none"),
    ],
    ids=["images", "no template", "pad"],
)
def test_what_a_language_model_cannot_take_is_said(
    place: Path, tmp_path: Path, kind: Any, run: Train, data: dict[str, Any], words: str
) -> None:
    conversations = ImageTextData(**data | {"source": str(place / data["source"])})
    with pytest.raises(EqatError, match=words):
        run(job_of(kind, place, tmp_path / "run", "llama", conversations=conversations))
    assert not (tmp_path / "run").exists()


def test_its_conversations_are_looked_through_before(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ImageTextData(source=str(place / "texts.json"), template="llava_hf")
    assert prepare_data(PrepareDataJob(model=str(place / "llama"), conversations=data)).is_file()
    assert "24 records about 0 images, 24 without one" in capsys.readouterr().out


# ---- text among conversations -------------------------------------------------------------------------


@BOTH
def test_a_share_of_the_samples_is_text(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: Any, run: Train
) -> None:
    job = job_of(kind, place, tmp_path / "run", data=text_of(place, count=4096), text_share=0.2)
    samples = samples_of(place / "llava", job, tmp_path / "run")
    windows = round(SAMPLES / 4)
    assert len(samples.dataset) == SAMPLES + windows
    assert sum(samples.dataset.text_only) == TEXTS + windows
    assert samples.order is not None
    assert sorted(samples.order.indices(0)) == list(range(SAMPLES + windows))
    assert samples.order.indices(0) != samples.order.indices(1)
    verify_checkpoint(run(job))
    assert f"23 conversations and {windows} windows of text" in capsys.readouterr().out


def test_a_run_on_both_is_planned_for_the_longer_of_them(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[Any] = []
    monkeypatch.setattr(tune, "announce_e2e_qp", lambda *given: planned.append(given[4]))
    for length in (8, 32):
        data, talks = replace(text_of(place), length=length), ImageTextData(str(place / "mixed.json"), max_length=20)
        e2e_qp(job_of(E2EQPJob, place, tmp_path / str(length), conversations=talks, data=data, text_share=0.1))
    assert [data.max_length for data in planned] == [20, 32]


@BOTH
def test_a_stopped_run_on_both_ends_as_a_whole_one(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, run: Train
) -> None:
    data = ImageTextData(source=str(place / "mixed.json"), text_warmup_steps=2)
    jobs = [
        job_of(kind, place, tmp_path / name, conversations=data, data=text_of(place), text_share=0.3, save_steps=2)
        for name in ("whole", "stopped")
    ]
    run(jobs[0])
    stop_at_step(monkeypatch, 4)
    with pytest.raises(Stopped):
        run(jobs[1])
    run(jobs[1])
    assert same_weights(tmp_path / "whole" / "model", tmp_path / "stopped" / "model")


@BOTH
def test_another_text_or_another_share_is_another_run(place: Path, tmp_path: Path, kind: Any, run: Train) -> None:
    job = job_of(kind, place, tmp_path / "run", data=text_of(place), text_share=0.3, max_steps=1)
    run(job)
    for changed in (replace(job, text_share=0.2), replace(job, data=replace(job.data, seed=5))):
        with pytest.raises(ConfigError) as raised:
            run(changed)
        assert_four_lines(raised.value)


@BOTH
def test_too_little_text_for_a_share_is_said(place: Path, tmp_path: Path, kind: Any, run: Train) -> None:
    job = job_of(kind, place, tmp_path / "run", data=text_of(place), text_share=0.99)
    with pytest.raises(DataError, match="--text_share") as raised:
        run(job)
    assert_four_lines(raised.value)
    assert not (tmp_path / "run").exists()
