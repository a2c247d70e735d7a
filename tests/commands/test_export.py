"""`eqat export`: exact or refused, whole or not there, with a card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eqat_mm.cli import main
from eqat_mm.commands.plumbing.runs import model_fingerprint
from eqat_mm.commands.verbs.export import ExportJob, export
from eqat_mm.errors import CheckpointError, ConfigError, EqatError, ExportError
from eqat_mm.export.folder import EXPORT, read_export
from eqat_mm.quant.spec import QuantSpec
from tests.export.made import packed

SYMMETRIC, LOSSY = QuantSpec(4, 32, symmetric=True), QuantSpec(4, 32)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("exact"), SYMMETRIC)


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("lossy"), LOSSY)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n\n".join(f"an end of {index} sons and one in ten" for index in range(60)), encoding="utf-8")
    return path


def test_from_the_command_line(exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(exact), "--to", "gguf", "--output", str(tmp_path / "out")]
    assert main(words) == 0
    assert f"exported: {tmp_path / 'out' / 'model'}" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "out" / "model").iterdir()}
    assert files >= {"full-w4g32sym.gguf", "README.md", EXPORT, "tokenizer.json", "chat_template.jinja"}
    assert main(words) == 0
    assert "already finished" in capsys.readouterr().out


def test_card(exact: Path, tmp_path: Path) -> None:
    card = (export(ExportJob(str(exact), to="gguf", output=tmp_path / "out")) / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: mit\n")
    assert "at 4 bits, on symmetric grids in groups of 32: 4.50 bits per weight" in card
    assert "Every quantized weight has the value" in card
    assert "rounding to nearest, seed 0" in card
    assert "--model tiny" in card
    assert "/somewhere" not in card
    assert "/elsewhere" not in card


def test_evaluations_kept_elsewhere_are_on_the_card(exact: Path, tmp_path: Path) -> None:
    found = {"model": "x", "fingerprint": model_fingerprint(exact), "perplexity": 14.36, "tokens": 1024}
    (tmp_path / "found.json").write_text(json.dumps(found), encoding="utf-8")
    words = ["export", str(exact), "--to", "gguf", "--output", str(tmp_path / "out")]
    assert main([*words, "--evaluations", str(tmp_path / "found.json")]) == 0
    assert "- perplexity 14.36, on 1,024 tokens" in (tmp_path / "out" / "model" / "README.md").read_text()


@pytest.mark.parametrize("text", ['{"model": "x", "fingerprint": "other", "perplexity": 1.0}', "[]", "none", None])
def test_evaluations_of_something_else_are_refused(text: str | None, exact: Path, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "found.json").write_text(text, encoding="utf-8")
    job = ExportJob(str(exact), to="gguf", output=tmp_path / "out", evaluations=tmp_path / "found.json")
    with pytest.raises(EqatError, match="found"):
        export(job)
    assert not (tmp_path / "out" / "model").exists()


def test_the_folder_says_what_it_is(exact: Path, tmp_path: Path) -> None:
    folder = export(ExportJob(str(exact), to="gguf", output=tmp_path / "out"))
    entry, manifest = read_export(folder)
    assert entry["format"] == "gguf"
    assert manifest.spec == SYMMETRIC.as_dict()
    file = folder / "full-w4g32sym.gguf"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"full-w4g32sym\.gguf"):
        read_export(folder)


def test_what_would_change_is_refused_before_anything_is_written(lossy: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"of 73,728 weights in [\s\S]*symmetric[\s\S]*--lossy true"):
        export(ExportJob(str(lossy), to="gguf", output=tmp_path / "out"))
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").glob("*"))


def test_lossy_needs_a_text_and_says_what_it_costs(
    lossy: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ExportJob(str(lossy), to="gguf", output=tmp_path / "out", lossy=True)
    with pytest.raises(ConfigError, match=r"--data\.source"):
        export(job)
    words = ["export", str(lossy), "--to", "gguf", "--output", str(tmp_path / "out"), "--lossy", "true"]
    words += ["--data.source", str(text), "--data.length", "16", "--data.count", "2"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "have other values than in the checkpoint: KL " in said
    assert "on 30 tokens" in said
    card = (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")
    assert "have other values than in the checkpoint: KL " in card


def test_a_failed_export_leaves_what_was_there(exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = ExportJob(str(exact), to="gguf", output=tmp_path / "out")
    before = export(job).joinpath(EXPORT).read_bytes()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("eqat_mm.export.gguf.form.write_file", stop)
    with pytest.raises(KeyboardInterrupt):
        export(ExportJob(str(exact), to="gguf", output=tmp_path / "out", overwrite=True))
    assert not (tmp_path / "out" / "model").exists()
    assert (tmp_path / "out" / ".replaced" / "model" / EXPORT).read_bytes() == before


def test_an_interrupted_export_is_finished_by_the_same_command(exact: Path, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError("no space")

    job = ExportJob(str(exact), to="gguf", output=tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eqat_mm.export.gguf.form.write_file", full)
        with pytest.raises(OSError, match="no space"):
            export(job)
    assert not (tmp_path / "out" / "model").exists()
    assert (export(job) / "full-w4g32sym.gguf").is_file()


def test_beside_the_run(exact: Path) -> None:
    folder = export(ExportJob(str(exact.parent), to="gguf"))
    assert folder == exact.parent.parent / f"{exact.parent.name}-gguf" / "model"


def test_other_settings_need_another_folder(exact: Path, tmp_path: Path) -> None:
    export(ExportJob(str(exact), to="gguf", output=tmp_path / "out"))
    with pytest.raises(ConfigError, match="embedding"):
        export(ExportJob(str(exact), to="gguf", output=tmp_path / "out", embedding="f16"))
    again = export(ExportJob(str(exact), to="gguf", output=tmp_path / "out", embedding="f16", overwrite=True))
    assert json.loads((again / EXPORT).read_text(encoding="utf-8"))["choices"]["embedding"] == "f16"


def test_full_precision_is_no_packed_checkpoint(exact: Path) -> None:
    with pytest.raises(CheckpointError, match="no eqat"):
        export(ExportJob(str(exact.parent / "full"), to="gguf"))
