"""What `evaluate` returns is what the command prints and saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import eqat_mm
from eqat_mm.cli import main
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.files import read_json
from tests.api.conftest import HELD_OUT
from tests.checkpoint.files import assert_four_lines
from tests.tiny_model import Tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*these settings are")

NUMBERS = ("perplexity", "kl", "top1_agreement", "tokens", "bits_per_weight")


def test_numbers_are_those_of_the_command(
    tiny: Tiny, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = eqat_mm.evaluate(eqat_mm.load(packed), text=tiny.text, output=tmp_path / "ours.json", settings=HELD_OUT)
    said = capsys.readouterr().out
    words = ["--data.source", str(tiny.text), "--data.length", "16", "--data.count", "4", "--precision", "float32"]
    reference = ["--reference", str(tiny.folder), "--output", str(tmp_path / "theirs.json")]
    assert main(["eval", str(packed / "model"), *words, *reference]) == 0
    assert without_time(capsys.readouterr().out) == without_time(said)
    ours, theirs = read_json(tmp_path / "ours.json"), read_json(tmp_path / "theirs.json")
    for name in NUMBERS:
        assert getattr(found, name) == ours[name] == theirs[name]
    assert found.tokens == 60
    assert found.tasks == {}
    for other in (packed, packed / "model", packed.parent):
        assert eqat_mm.evaluate(other, text=tiny.text, settings=HELD_OUT).perplexity == found.perplexity


def without_time(said: str) -> str:
    return said.rpartition(" (")[0]


def test_quiet_and_without_a_reference(tiny: Tiny, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = eqat_mm.evaluate(packed, text=tiny.text, reference=None, quiet=True, settings=HELD_OUT)
    assert (found.kl, found.top1_agreement) == (None, None)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


def test_a_source_that_is_gone_is_told(
    tiny: Tiny, packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("eqat_mm.api.judging.config_of", lambda name: None)
    assert eqat_mm.evaluate(packed, text=tiny.text, settings=HELD_OUT).kl is None
    assert f"compared with nothing: {tiny.folder}" in capsys.readouterr().out


def test_choices_out_of_a_file(tiny: Tiny, packed: Path, tmp_path: Path) -> None:
    file = tmp_path / "choices.jsonl"
    file.write_text('{"query": "w5 w6", "choices": ["w7", "w8 w9"], "gold": 1}', "utf-8")
    found = eqat_mm.evaluate(packed, task_file=file)
    assert (found.choices["questions"], found.choices["file"]) == (1, str(file))
    assert found.choices["margin_change"] > 0  # compared with what the model was made from
    assert found.perplexity is None


def test_tasks_and_text(tiny: Tiny, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval is replaced: it needs a model that sees, and minutes."""
    asked: list[tuple[Path, str, dict[str, Any]]] = []

    def answered(folder: Path, tasks: str, **options: Any) -> dict[str, Any]:
        asked.append((folder, tasks, options))
        row = {"accuracy": 0.5, "questions": 4, "by_type": {}, "metrics": {"exact_match": 0.5}}
        return {"tasks": {"easy_vqa": row}, "seconds": 3.0}

    monkeypatch.setattr("eqat_mm.commands.verbs.evaluate.evaluate_tasks", answered)
    found = eqat_mm.evaluate(
        packed, text=tiny.text, tasks=["easy_vqa", "mme"], limit=4, output=tmp_path / "all.json", settings=HELD_OUT
    )
    assert found.tasks["easy_vqa"]["accuracy"] == 0.5
    assert found.perplexity is not None
    assert found.seconds > 3.0
    assert [(folder, tasks, options["limit"]) for folder, tasks, options in asked] == [
        (packed / "model", "easy_vqa,mme", 4)
    ]
    assert read_json(tmp_path / "all.tasks.json")["tasks"].keys() == {"easy_vqa"}
    assert read_json(tmp_path / "all.json")["perplexity"] == found.perplexity
    found = eqat_mm.evaluate(packed, tasks="easy_vqa", reference=tiny.folder)
    assert (found.perplexity, found.reference_tasks.keys()) == (None, {"easy_vqa"})


@pytest.mark.parametrize(
    "settings",
    [{}, {"text": "t.txt", "limit": 3}, {"text": "t.txt", "dat.count": 3}, {"text": "t.txt", "processor": "p"}],
    ids=str,
)
def test_wrong_settings_are_four_lines(packed: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as raised:
        eqat_mm.evaluate(packed, **settings)
    assert_four_lines(raised.value)
