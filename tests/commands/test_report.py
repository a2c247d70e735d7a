"""`eqat report`: from the command to the file, with and without questions."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eqat_mm.cli import main
from eqat_mm.commands.quantize import RTNJob, rtn
from eqat_mm.commands.report import ReportJob, report
from eqat_mm.errors import CheckpointError, ConfigError, DataError, EqatError
from eqat_mm.report import charts
from tests.commands.jobs import SPEC, rtn_job
from tests.report.html import checked
from tests.tiny_llava import save_tiny_llava
from tests.tiny_model import Tiny


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one run; not to be altered but for reports."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    rtn(rtn_job(tiny, folder / "rtn"))
    return folder


def test_the_page_is_in_the_folder_of_the_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(runs)]) == 0
    assert f"report: {runs / 'report.html'}" in capsys.readouterr().out
    page = checked((runs / "report.html").read_text(encoding="utf-8"))
    assert "answers are not asked for by default" in page.words


def test_a_model_loads_nothing_unless_questions_are_asked(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("eqat_mm.commands.report_answers.load_model", never)
    report(ReportJob(run=runs / "rtn"))
    with pytest.raises(AssertionError, match="is loaded"):
        report(ReportJob(run=runs / "rtn", samples=1))


def test_all_models_answer_the_questions_of_a_file(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "questions.txt").write_text("w3 w4 <b>w5</b>\n\n  w6 w7\n", encoding="utf-8")
    output = tmp_path / "new" / "page.html"
    job = ReportJob(run=runs, output=output, samples=3, questions=tmp_path / "questions.txt", max_new_tokens=4)
    assert report(job) == output
    words = checked(output.read_text(encoding="utf-8")).words
    assert words.count("w3 w4 <b>w5</b>") == 2  # from the beginning again
    assert words.count("w6 w7") == 1
    assert words.count("full precision") >= 3
    assert words.count("round-to-nearest (rtn)") >= 3


def test_a_vision_language_model_answers_about_images(tmp_path: Path) -> None:
    save_tiny_llava(tmp_path / "llava")
    rtn(RTNJob(model=str(tmp_path / "llava"), output=tmp_path / "runs" / "rtn", quant=SPEC))
    for name, colour in (("one", "red"), ("two", "blue")):
        Image.new("RGB", (600, 30), colour).save(tmp_path / f"{name}.png")
    images = [str(tmp_path / f"{name}.png") for name in ("one", "two")]
    (tmp_path / "questions.txt").write_text("w3 w4\nw5 w6\n", encoding="utf-8")
    asked: dict[str, Any] = {
        "samples": 2,
        "questions": tmp_path / "questions.txt",
        "image": images,
        "max_new_tokens": 3,
    }
    page = checked(report(ReportJob(run=tmp_path / "runs", **asked)).read_text(encoding="utf-8"))
    pictures = [address for address in page.addresses if address.startswith("data:image/jpeg")]
    assert len(set(pictures)) == 2
    assert "vision_tower" in page.words


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"run": "nowhere"}, CheckpointError, "no such folder"),
        ({"samples": 1, "questions": "nowhere.txt"}, DataError, "nowhere.txt"),
        ({"samples": 1, "questions": "empty.txt"}, DataError, "no question"),
        ({"samples": 1, "questions": "bytes.txt"}, DataError, "UTF-8"),
        ({"samples": 1, "image": ["nowhere.png"]}, DataError, "nowhere.png"),
        ({"samples": 1, "image": ["some.png"]}, ConfigError, "reads text only"),
    ],
)
def test_bad_input_is_refused(
    changes: dict[str, Any],
    error: type[EqatError],
    said: str,
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n", encoding="utf-8")
    Path("bytes.txt").write_bytes(b"\xff\xfe")
    Image.new("RGB", (8, 8)).save("some.png")
    given = {"run": runs, "output": tmp_path / "page.html"} | changes
    for name in ("run", "questions"):
        given |= {name: Path(given[name])} if name in given else {}
    with pytest.raises(error, match=said):
        report(ReportJob(**given))
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("given", [{"questions": Path("q.txt")}, {"image": ["a.png"]}])
def test_what_is_said_of_questions_in_vain_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no --samples"):
        ReportJob(run=tmp_path, **given)


def test_the_package_that_draws_is_asked_for(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        charts, "find_spec", lambda name: None if name == "matplotlib" else importlib.util.find_spec(name)
    )
    with pytest.raises(ConfigError, match=r"eqat-mm\[report\]"):
        report(ReportJob(run=runs))
