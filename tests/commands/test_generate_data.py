"""`eqat generate-data`: one file, whoever writes it and however often it is interrupted."""

from __future__ import annotations

import json
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_mm.checkpoint.folders import load_tokenizer
from eqat_mm.cli import main
from eqat_mm.commands.verbs import generate_data as module
from eqat_mm.commands.verbs.generate_data import GenerateDataJob, generate_data
from eqat_mm.commands.verbs.quantize import rtn
from eqat_mm.data.generated.record_parts import RecordFile, parts_folder
from eqat_mm.data.text.documents import load_documents
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.data.text.windows import text_windows
from eqat_mm.errors import ConfigError, EqatError
from eqat_mm.runtime.files import read_json, sha256_of
from eqat_mm.runtime.run import Run
from tests.checkpoint.files import assert_four_lines
from tests.commands.jobs import rtn_job
from tests.tiny_llava import save_tiny_llava
from tests.tiny_model import Tiny

COUNT = 12


def job_of(tiny: Tiny, output: Path, **changes: Any) -> GenerateDataJob:
    settings: dict[str, Any] = {
        "model": str(tiny.folder),
        "output": output,
        "count": COUNT,
        "length": 20,
        "batch_size": 4,
        "min_tokens": 4,
        "device": "cpu",
    }
    return GenerateDataJob(**(settings | changes))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def refused(job: GenerateDataJob, error: type[EqatError] = ConfigError) -> str:
    with pytest.raises(error) as raised:
        generate_data(job)
    assert_four_lines(raised.value)
    return str(raised.value)


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a run that nobody interrupted; not to be altered."""
    return generate_data(job_of(tiny, tmp_path_factory.mktemp("whole") / "texts.jsonl"))


# ---- the file ---------------------------------------------------------------------------------------


def test_the_file_holds_every_text(tiny: Tiny, whole: Path) -> None:
    records = lines_of(whole)
    tokenizer = load_tokenizer(tiny.folder)
    assert [record["index"] for record in records] == list(range(COUNT))
    for record in records:
        assert record.keys() == {"text", "index", "tokens", "ended", "looped"}
        assert len(tokenizer(record["text"])["input_ids"]) == record["tokens"]
        assert record["ended"] or record["tokens"] == 20
    assert sorted(path.name for path in whole.parent.iterdir()) == ["texts.jsonl", "texts.jsonl.json"]


def test_the_file_is_calibration_text(tiny: Tiny, whole: Path) -> None:
    assert load_documents(str(whole)) == [record["text"] for record in lines_of(whole)]
    windows = text_windows(load_tokenizer(tiny.folder), TextWindows(str(whole), part="all", length=16, count=4))
    assert windows.shape == (4, 16)


def test_how_it_was_made_is_beside_it(tiny: Tiny, whole: Path) -> None:
    facts = read_json(whole.with_name("texts.jsonl.json"))
    assert facts["command"] == "generate-data"
    assert facts["config"]["model"] == str(tiny.folder)
    assert {name: value for name, value in facts["decides"].items() if name != "inputs"} == {
        "count": COUNT,
        "length": 20,
        "sampling": "paper",
        "seed": 0,
        "min_tokens": 4,
        "max_repeated": 0.5,
        "drop_degenerate": False,
        "quantized": False,
    }
    assert facts["decides"]["inputs"].keys() == {"model"}
    assert facts["versions"]["torch"]
    assert facts["texts"] == COUNT
    assert facts["tokens"] == sum(record["tokens"] for record in lines_of(whole))
    assert facts["ended"] == sum(record["ended"] for record in lines_of(whole))
    assert facts["proof"] == sha256_of(whole)


def test_parquet_holds_the_same(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    from pyarrow import parquet

    path = generate_data(job_of(tiny, tmp_path / "texts.parquet"))
    assert parquet.read_table(path).to_pylist() == lines_of(whole)
    assert load_documents(str(path)) == load_documents(str(whole))


def test_degenerate_texts_are_counted_and_dropped(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = lines_of(generate_data(job_of(tiny, tmp_path / "every.jsonl", count=40, batch_size=20)))
    good = [record for record in every if record["tokens"] >= 18 or not record["ended"]]
    bad = len(every) - len(good)
    assert 0 < bad < 40
    dropping = job_of(tiny, tmp_path / "good.jsonl", count=40, batch_size=20, min_tokens=18, drop_degenerate=True)
    assert lines_of(generate_data(dropping)) == good
    facts = read_json(tmp_path / "good.jsonl.json")
    assert (facts["ended_early"], facts["dropped"], facts["texts"]) == (bad, bad, len(good))
    assert f"{bad} end before 18 tokens, {bad} were dropped" in capsys.readouterr().out


def test_loops_are_counted(tiny: Tiny, tmp_path: Path) -> None:
    path = generate_data(job_of(tiny, tmp_path / "texts.jsonl", sampling="greedy", length=100, max_repeated=0.2))
    records = lines_of(path)
    assert read_json(path.with_name("texts.jsonl.json"))["looped"] == sum(record["looped"] for record in records) > 0


def test_nothing_left_is_said(tiny: Tiny, tmp_path: Path) -> None:
    said = refused(job_of(tiny, tmp_path / "texts.jsonl", count=1, max_repeated=0.0, sampling="greedy", length=120,
                          min_tokens=120, drop_degenerate=True))  # fmt: skip
    assert "all degenerate" in said
    assert not (tmp_path / "texts.jsonl").exists()


# ---- who writes it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_batch_size_changes_nothing(tiny: Tiny, whole: Path, tmp_path: Path, batch_size: int) -> None:
    path = generate_data(job_of(tiny, tmp_path / "texts.jsonl", batch_size=batch_size))
    assert path.read_bytes() == whole.read_bytes()


def test_shards_write_one_file(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    for shard in ("3/3", "1/3", "2/3"):
        assert not (tmp_path / "texts.jsonl").exists()
        path = generate_data(job_of(tiny, tmp_path / "texts.jsonl", shard=shard))
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["texts.jsonl", "texts.jsonl.json"]


def test_processes_of_a_launcher_write_one_file(
    tiny: Tiny, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "texts.jsonl"
    flags = {"model": tiny.folder, "output": path, "count": COUNT, "length": 20, "min_tokens": 4, "device": "cpu"}
    given = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    words = ["eqat", "--local_rank=0", "generate-data", *given]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command replaces it
    monkeypatch.setattr("eqat_mm.runtime.ending.quit_when_asked", lambda: None)  # this process goes on
    monkeypatch.setattr("eqat_mm.runtime.ending.keep_status", lambda _: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        assert not path.exists()
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("eqat_mm", run_name="__main__")
        assert ended.value.code == 0
    assert path.read_bytes() == whole.read_bytes()


def kill_after(records: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the process when so many records are written, the last one but for half of it."""
    add, left = RecordFile.add, [records]

    def add_or_end(self: RecordFile, record: dict[str, Any]) -> None:
        if left[0] == 0:
            with self._path.open("ab") as file:
                file.write(json.dumps(record).encode()[:25])
            raise KeyboardInterrupt
        left[0] -= 1
        add(self, record)

    monkeypatch.setattr(RecordFile, "add", add_or_end)


@pytest.mark.parametrize("shards", [(None,), ("1/2", "2/2")], ids=["one process", "two processes"])
def test_a_killed_run_is_continued(
    tiny: Tiny, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: tuple[str | None, ...]
) -> None:
    output = tmp_path / "texts.jsonl"
    with monkeypatch.context() as patch:
        kill_after(5, patch)
        with pytest.raises(KeyboardInterrupt):
            generate_data(job_of(tiny, output))
    assert not output.exists()
    with pytest.raises(ValueError, match="Unterminated"):
        lines_of(parts_folder(output) / "1-of-1.jsonl")
    asked: list[int] = []
    generate = module.generate_tokens

    def remember(model: Any, vocabulary: Any, indices: list[int], **settings: Any) -> Any:
        asked.extend(indices)
        return generate(model, vocabulary, indices, **settings)

    monkeypatch.setattr(module, "generate_tokens", remember)
    for shard in shards:
        generate_data(job_of(tiny, output, shard=shard, batch_size=2))
    assert len(asked) == COUNT - 5
    assert output.read_bytes() == whole.read_bytes()
    assert not parts_folder(output).exists()


def test_a_run_killed_while_it_put_the_texts_together(
    tiny: Tiny, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "texts.jsonl"

    def end(_: Run) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", end)
        with pytest.raises(KeyboardInterrupt):
            generate_data(job_of(tiny, output))
    generate_data(job_of(tiny, output))
    assert output.read_bytes() == whole.read_bytes()
    assert read_json(tmp_path / "texts.jsonl.json")["texts"] == COUNT


def test_a_process_that_comes_too_late_writes_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_of(tiny, tmp_path / "texts.jsonl", count=2)
    load = module.load_model

    def load_while_another_writes(*where: Any) -> Any:
        monkeypatch.setattr(module, "load_model", load)
        generate_data(job)
        return load(*where)

    monkeypatch.setattr(module, "load_model", load_while_another_writes)
    generate_data(job)
    assert capsys.readouterr().out.count("written here") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.jsonl", "texts.jsonl.json"]


def test_a_finished_file_is_left_alone(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_of(tiny, tmp_path / "texts.jsonl", count=2)
    before = generate_data(job).stat().st_mtime_ns
    assert generate_data(job).stat().st_mtime_ns == before
    assert "already finished" in capsys.readouterr().out
    assert "seed=1" in refused(job_of(tiny, tmp_path / "texts.jsonl", count=2, seed=1))
    generate_data(job_of(tiny, tmp_path / "texts.jsonl", count=2, seed=1, overwrite=True))
    assert read_json(tmp_path / "texts.jsonl.json")["seed"] == 1


# ---- which models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llava", "llava_next"])
def test_the_language_tower_of_a_llava(tmp_path: Path, arch: str) -> None:
    folder = tmp_path / arch
    save_tiny_llava(folder, arch, dtype=torch.float32)
    settings = {"count": 6, "length": 20, "device": "cpu"}
    paths = [
        generate_data(GenerateDataJob(str(folder), tmp_path / f"{size}.jsonl", batch_size=size, **settings))  # type: ignore[arg-type]
        for size in (1, 4)
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert "<image>" not in paths[0].read_text(encoding="utf-8")


def test_a_quantized_model_is_said(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = rtn(rtn_job(tiny, tmp_path / "rtn"))
    path = generate_data(job_of(tiny, tmp_path / "texts.jsonl", model=str(packed), count=3))
    assert "is quantized" in capsys.readouterr().out
    assert len(lines_of(path)) == 3
    assert read_json(path.with_name("texts.jsonl.json"))["decides"]["quantized"] is True


# ---- refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"length": 129}, "up to 128"),
        ({"shard": "0/2"}, "--shard"),
        ({"shard": "3/2"}, "--shard"),
        ({"shard": "half"}, "--shard"),
        ({"shard": f"1/{10**4}{5000 * '0'}"}, "--shard"),
        ({"shard": "1/2", "overwrite": True}, "--overwrite"),
        ({"device": "tpu"}, "--device"),
    ],
    ids=str,
)
def test_bad_settings(tiny: Tiny, tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    assert named in refused(job_of(tiny, tmp_path / "texts.jsonl", **changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["texts", "texts.txt", "texts.json"])
def test_an_unknown_suffix(tiny: Tiny, tmp_path: Path, name: str) -> None:
    assert ".jsonl or .parquet" in refused(job_of(tiny, tmp_path / name))


def test_a_shard_under_a_launcher(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "leave --shard out" in refused(job_of(tiny, tmp_path / "texts.jsonl", shard="1/2"))


def test_files_of_others_are_not_overwritten(tiny: Tiny, tmp_path: Path) -> None:
    output = tmp_path / "texts.jsonl"
    output.write_text("mine", encoding="utf-8")
    assert "without the record of a run" in refused(job_of(tiny, output))
    assert output.read_text(encoding="utf-8") == "mine"
    (tmp_path / "folder.jsonl").mkdir()
    assert "a folder" in refused(job_of(tiny, tmp_path / "folder.jsonl", overwrite=True))


def test_an_unfinished_run_of_other_settings(tiny: Tiny, tmp_path: Path) -> None:
    output = tmp_path / "texts.jsonl"
    generate_data(job_of(tiny, output, shard="1/2"))
    assert "length=30" in refused(job_of(tiny, output, shard="2/2", length=30))


def test_bad_input_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate-data", "m", "--sampling", "beam", "--output", str(tmp_path / "texts.jsonl")]) == 2
    assert "sampling" in capsys.readouterr().err
