"""The text that recipes name, read from stand-ins of the published layout; several texts by their weights."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
import torch
from pyarrow import parquet

from eqat_mm.commands.line.recipes import named_recipe, recipe_names
from eqat_mm.data.hub import PUBLIC
from eqat_mm.data.text import windows as module
from eqat_mm.data.text.settings import TextSource, TextWindows, shares
from eqat_mm.data.text.windows import text_windows
from eqat_mm.errors import ConfigError, DataError
from tests.tiny_model import WORDS, word_tokenizer

README = "---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: train\n    path: {path}\n---\n"


def texts(seed: int, count: int = 40, first: int = 2, last: int = 97) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS[first:last], k=draw.randrange(20, 60))) for _ in range(count)]


def save_slimpajama(folder: Path) -> None:
    """48 parquet shards; each row has a text, its origin and an index that pandas left."""
    (folder / "data").mkdir(parents=True)
    for shard in range(48):
        words = texts(shard)
        origin = [{"redpajama_set_name": "RedPajamaC4"}] * len(words)
        table = arrow.table({"text": words, "meta": origin, "__index_level_0__": range(len(words))})
        parquet.write_table(table, folder / "data" / f"train-{shard:05}-of-00048-ab2b35705f029d94.parquet")
    (folder / "README.md").write_text(README.format(config="default", path="data/train-*"), encoding="utf-8")


def save_c4(folder: Path) -> None:
    """Shards of JSON lines, gzipped; each record has a text, a time and an address."""
    (folder / "en").mkdir(parents=True)
    for shard in range(8):
        rows = [{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://x"} for text in texts(shard)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "en" / f"c4-train.{shard:05}-of-01024.json.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "README.md").write_text(README.format(config="en", path="en/c4-train.*.json.gz"), encoding="utf-8")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which the names of repositories are folders."""
    folder = tmp_path_factory.mktemp("hub")
    save_slimpajama(folder / "DKYoon" / "SlimPajama-6B")
    save_c4(folder / "allenai" / "c4")
    return folder


def data_lines() -> dict[str, dict[str, Any]]:
    """The settings of text in every recipe."""
    found = {}
    for name in recipe_names():
        recipe = named_recipe(name)
        assert recipe is not None
        stages = [recipe.settings, *(value for value in recipe.settings.values() if isinstance(value, dict))]
        for stage in stages:
            for key in ("calibration", "data"):
                if isinstance(stage.get(key), dict):
                    found[f"{name}: {key}"] = stage[key]
    return found


LINES = data_lines()


@pytest.mark.parametrize("line", [line for line, data in LINES.items() if data["source"] != "demo-wikipedia"])
def test_the_data_line_of_a_recipe_reads_its_repository(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    monkeypatch.chdir(hub)
    small = TextWindows(**{**LINES[line], "length": 16, "count": 64})
    windows = text_windows(word_tokenizer(), small)
    assert windows.shape == (64, 16)
    assert "48 shards" in capsys.readouterr().out


def test_every_recipe_names_public_text_or_the_demos() -> None:
    assert len(LINES) > 20
    assert {data["source"] for data in LINES.values()} == {"demo-wikipedia", PUBLIC[0]}


@pytest.mark.parametrize("source", PUBLIC)
def test_a_public_text_is_streamed_the_same_every_time(hub: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(hub)
    config = TextWindows(source, length=16, count=40)
    first, again = (text_windows(word_tokenizer(), config) for _ in range(2))
    other = text_windows(word_tokenizer(), TextWindows(source, length=16, count=40, seed=1))
    held_out = text_windows(word_tokenizer(), TextWindows(source, length=16, count=40, part="held_out"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert {tuple(row.tolist()) for row in first}.isdisjoint({tuple(row.tolist()) for row in held_out})


def test_a_whole_data_set_is_loaded_where_no_number_is_asked_for(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub)
    assert len(text_windows(word_tokenizer(), TextWindows("hf:allenai/c4:en", length=16))) > 500
    assert len(text_windows(word_tokenizer(), TextWindows("hf:allenai/c4:en:train[:10%]", length=16, count=8))) == 8


def test_a_repository_with_a_script_is_answered_with_public_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "togethercomputer" / "RedPajama-Data-1T-Sample"
    folder.mkdir(parents=True)
    (folder / "RedPajama-Data-1T-Sample.py").write_text("import datasets\n", encoding="utf-8")
    with pytest.raises(DataError) as raised:
        text_windows(word_tokenizer(), TextWindows("hf:togethercomputer/RedPajama-Data-1T-Sample", length=16, count=4))
    assert "no loading script" in raised.value.allowed
    assert all(source in raised.value.do for source in PUBLIC)


@pytest.mark.parametrize("name", ["hf:a/b:x", "hf:DKYoon/SlimPajama-6B:no-such"])
def test_a_data_set_that_is_not_there(hub: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(hub)
    with pytest.raises(DataError) as raised:
        text_windows(word_tokenizer(), TextWindows(name, length=16, count=4))
    assert raised.value.where == name


def test_a_column_of_another_name_is_named(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub)
    with pytest.raises(DataError) as raised:
        text_windows(word_tokenizer(), TextWindows("hf:allenai/c4:en", text_field="content", length=16, count=4))
    assert "text, timestamp, url" in raised.value.given
    assert "--calibration.text_field" in raised.value.do
    addresses = TextWindows("hf:allenai/c4:en", text_field="url", length=16, count=4, part="all")
    assert text_windows(word_tokenizer(), addresses).unique().tolist() == [0, 1]


# ---- several texts ----------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> list[TextSource]:
    """Texts of other words each, in a file of each kind."""
    (tmp_path / "low.txt").write_text("\n\n\n".join(texts(0, 80, 2, 50)), encoding="utf-8")
    rows = "".join(json.dumps({"code": text}) + "\n" for text in texts(1, 80, 50, 97))
    (tmp_path / "high.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    low, high = str(tmp_path / "low.txt"), str(tmp_path / "high.jsonl.gz")
    return [TextSource(low, 3.0), TextSource(high, 1.0, "code")]


def test_several_texts_share_the_windows_by_weight(two: list[TextSource]) -> None:
    windows = text_windows(word_tokenizer(), TextWindows(two, length=16, count=40))
    high = (windows >= 50).any(dim=1)
    assert high.sum() == 10
    assert not ((windows >= 50).any(dim=1) & ((windows > 1) & (windows < 50)).any(dim=1)).any()
    assert high[:20].any()
    assert high[20:].any()
    assert torch.equal(windows, text_windows(word_tokenizer(), TextWindows(two, length=16, count=40)))


def test_one_of_several_is_as_it_is_alone(two: list[TextSource]) -> None:
    alone = text_windows(word_tokenizer(), TextWindows(two[0].path, length=16, count=8))
    assert torch.equal(text_windows(word_tokenizer(), TextWindows([two[0]], length=16, count=8)), alone)


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [
        ([3, 1], 40, [30, 10]),
        ([1, 1, 1], 10, [4, 3, 3]),
        ([1, 1000], 10, [0, 10]),
        ([0.1, 0.1], 1, [1, 0]),
        ([2], 7, [7]),
    ],
)
def test_shares_are_whole_and_all(weights: list[float], total: int, expected: list[int]) -> None:
    assert shares(weights, total) == expected


@pytest.mark.parametrize("source", [[], [TextSource("a"), TextSource("b")], "[a, b]"])
def test_several_texts_need_a_number(source: Any) -> None:
    with pytest.raises(ConfigError, match=r"--data\.source"):
        TextWindows(source)


def test_a_draw_that_falls_short_is_drawn_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text of one character for several tokens, or with more white space than words."""
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": "w2" + " " * 300 + "w3"}) + "\n" for _ in range(2000))
    )
    monkeypatch.setattr("eqat_mm.data.text.documents._WHOLE", 0)
    assert text_windows(word_tokenizer(), TextWindows(str(tmp_path), length=16, count=8, part="all")).shape == (8, 16)
    with pytest.raises(DataError, match="give more text"):
        text_windows(word_tokenizer(), TextWindows(str(tmp_path), length=16, count=8000, part="all"))


def test_only_as_much_is_drawn_as_windows_need(two: list[TextSource], monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0

    def counted(source: str, field: str, seed: int) -> Any:
        nonlocal taken
        for number in range(10**6):
            taken += 1
            yield f"w{number % 95 + 2} " * 40

    monkeypatch.setattr(module, "drawn_documents", counted)
    assert len(text_windows(word_tokenizer(), TextWindows(two[0].path, length=16, count=64, part="all"))) == 64
    assert taken < 200
