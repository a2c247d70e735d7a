"""A source is looked through once; what is found is read again where nothing that decides it has changed."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eqat_mm.data.image_text import preparing as module
from eqat_mm.data.image_text import spread
from eqat_mm.data.image_text.chat import Chat
from eqat_mm.data.image_text.index import Index
from eqat_mm.data.image_text.preparing import Preparation
from eqat_mm.data.image_text.problems import MissingImage, UnreadableImage
from eqat_mm.data.image_text.record_sources import open_source
from eqat_mm.data.image_text.samples import image_text_data
from eqat_mm.data.image_text.settings import ImageTextData
from eqat_mm.errors import DataError
from tests.data.tiny_processor import MISTRAL, llava_processor


def record(question: str, answer: str, image: Any = None) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **({} if image is None else {"image": image})}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six records: two about one image, one about another, one about none there, two texts."""
    for name, size in (("a.png", (28, 28)), ("b.jpg", (90, 30))):
        Image.effect_noise(size, 50).save(tmp_path / name)
    records = [
        record("<image>\nwhat is it?", "a red cat", "a.png"),
        record("is it big?", "yes"),
        record("<image>", "no", "b.jpg"),
        record("<image>\nis it big?", "yes", "a.png"),
        record("<image>", "no", "gone.png"),
        record("sure?", "no " * 30),
    ]
    (tmp_path / "train.json").write_text(json.dumps(records))
    return tmp_path / "train.json"


def preparation(source: Path, processor: Any = None, **options: Any) -> Preparation:
    given = {"max_length": 200, "count": None, "seed": 0} | options
    folder = given.pop("image_folder", None)
    return Preparation(open_source(str(source), folder), Chat(processor or llava_processor()), **given)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records looked at in each pass."""
    found: list[int] = []
    whole = module.spread
    monkeypatch.setattr(
        module, "spread", lambda work, all, what: found.append(sum(map(len, all))) or whole(work, all, what)
    )
    return found


def test_what_is_known_of_records(source: Path) -> None:
    index, path = preparation(source).index()
    assert path.parent == source.with_name("train.json.prepared")
    data = json.loads(source.read_text())
    raw = source.read_bytes()
    for at, (start, size) in enumerate(zip(index.starts, index.sizes, strict=True)):
        assert json.loads(raw[start : start + size]) == data[at]
    assert index.numbers.tolist() == [*range(6)]
    assert index.shown.tolist() == [1, 0, 1, 1, 0, 0]
    assert index.owners.tolist() == [0, 2, 3]
    assert index.image_sizes.tolist() == [[28, 28], [30, 90], [28, 28]]
    assert index.images[0] == index.images[2] != index.images[1]
    assert index.of_kind(MissingImage).tolist() == [4]
    assert index.words() == {4: f"image {source.parent}/gone.png is missing"}
    assert len({*index.contents.tolist()}) == 6
    whole = image_text_data(llava_processor(), ImageTextData(str(source), on_bad_sample="skip"))
    assert index.lengths[index.kinds == 0].tolist() == [len(whole[at]["input_ids"]) for at in range(5)]


def test_a_second_look_is_none(source: Path, passes: list[int]) -> None:
    first, _ = preparation(source).index()
    again, _ = preparation(source).index()
    assert passes == [6]
    for name, column in vars(first).items():
        assert np.array_equal(column, getattr(again, name)), name


@pytest.mark.parametrize("what", ["file", "template", "max_length", "count", "folder", "layout", "damaged"])
def test_what_decides_it_is_noticed(
    source: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    _, path = preparation(source).index()
    changed: dict[str, Any] = {
        "template": {"processor": llava_processor(MISTRAL)},
        "max_length": {"max_length": 20},
        "count": {"count": 3},
        "folder": {"image_folder": source.parent / "train.json.prepared"},
    }
    if what == "file":
        source.write_text(source.read_text().replace("a red cat", "a bad cat"))
    if what == "layout":
        monkeypatch.setattr(module, "_LAYOUT", 99)
    if what == "damaged":
        path.write_bytes(path.read_bytes()[:-9])
    index, other = preparation(source, **changed.get(what, {})).index()
    assert len(passes) == 2
    assert len(index) == (3 if what == "count" else 6)
    assert path.exists() == (what != "file")  # the index of what the file was before is of no use any more
    assert (other == path) == (what == "damaged")


def test_all_cores_find_what_one_finds(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = json.loads(source.read_text())
    many = source.with_name("many.json")
    many.write_text(json.dumps([record for number in range(60) for record in records]))
    alone, path = preparation(many).index()
    path.unlink()
    monkeypatch.setattr(module, "_FEW", 1)
    monkeypatch.setattr(spread, "FEW", 1)
    monkeypatch.setattr(module, "_PER_BATCH", 50)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    together, _ = preparation(many).index()
    for name, column in vars(alone).items():
        assert np.array_equal(column, getattr(together, name)), name


def test_an_error_of_another_process_is_that_of_the_command(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FEW", 1)
    monkeypatch.setattr(spread, "FEW", 1)
    monkeypatch.setattr(module, "_PER_BATCH", 2)
    monkeypatch.setattr(module, "_HOPELESS", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    source.write_text(json.dumps([record("<image>", "no", "gone.png")] * 9))
    with pytest.raises(DataError, match="images are all missing"):
        preparation(source).index()
    assert not multiprocessing.active_children()


def test_where_the_quick_way_fails_every_sample_is_asked_for(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, path = preparation(source).index()
    path.unlink()
    monkeypatch.setattr(module, "_FEW", 1)
    lengths = module.QuickLengths.lengths
    monkeypatch.setattr(
        module.QuickLengths, "lengths", lambda *given: (_ for _ in ()).throw(module.Inexact("the tokenizer"))
    )
    found, _ = preparation(source).index()
    assert lengths is not module.QuickLengths.lengths
    assert np.array_equal(found.lengths, expected.lengths)
    assert "the tokenizer must be asked for every sample" in capsys.readouterr().out


def test_missing_images_are_looked_for_again(source: Path, passes: list[int]) -> None:
    preparation(source).index()
    Image.effect_noise((20, 40), 50).save(source.parent / "gone.png")
    as_found, _ = preparation(source).index()
    assert as_found.of_kind(MissingImage).tolist() == [4]
    again, _ = preparation(source).index(look_again=True)
    assert passes == [6, 1]
    assert not again.kinds.any()
    assert again.words() == {}
    assert again.owners.tolist() == [0, 2, 3, 4]
    assert again.image_sizes[3].tolist() == [40, 20]
    fresh = preparation(source, max_length=199).index()[0]
    for name, column in vars(again).items():
        assert np.array_equal(column, getattr(fresh, name)), name


def test_every_image_is_decoded_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source.parent / "b.jpg").write_bytes((source.parent / "b.jpg").read_bytes()[:-300])
    read: list[str] = []
    decode = module.decoded_size
    monkeypatch.setattr(module, "decoded_size", lambda image: read.append(image.path.name) or decode(image))
    assert not preparation(source).index()[0].of_kind(UnreadableImage).size
    for _ in range(2):
        index, path = preparation(source).index(decode=True)
        assert index.of_kind(UnreadableImage).tolist() == [2]
        assert "b.jpg is unreadable" in index.words()[2]
    assert sorted(read) == ["a.png", "b.jpg"]
    assert preparation(source).index()[1] == path  # what is known is used, whether asked for or not


def test_a_folder_that_cannot_be_written_leaves_the_cache(
    source: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EQAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_can_write", lambda folder: "cache" in folder.parts)
    for _ in range(2):
        _, path = preparation(source).index()
        assert path.is_relative_to(tmp_path / "cache" / "prepared")
    assert passes == [6]
    assert not source.with_name("train.json.prepared").exists()


def _prepare(source: Path, number: int) -> None:
    os.environ["LOCAL_RANK"] = str(number)
    _, path = preparation(source).index()
    (path.parent / f"{number}.seen").write_text(str(path.stat().st_ino))


def test_processes_that_start_together_make_one(source: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_prepare, args=(source, number)) for number in (1, 0, 2)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    seen = [path.read_text() for path in source.with_name("train.json.prepared").glob("*.seen")]
    assert len(seen) == 3
    assert len({*seen}) == 1


def test_no_index_is_made_of_what_is_none(tmp_path: Path) -> None:
    assert Index.open(tmp_path / "none.safetensors") is None
    (tmp_path / "none.safetensors").write_bytes(b"no index")
    assert Index.open(tmp_path / "none.safetensors") is None


@pytest.mark.parametrize("text", ["[]", "\n"], ids=["json", "jsonl"])
def test_a_source_without_records_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / ("none.json" if text == "[]" else "none.jsonl")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="no records"):
        preparation(path).index()


def test_more_records_than_there_are_are_refused_with_what_takes_all(source: Path) -> None:
    with pytest.raises(DataError) as raised:
        preparation(source, count=7).index()
    assert raised.value.allowed == "at least conversations.count, 7"
    assert "to 6 or fewer, or to null" in raised.value.do
