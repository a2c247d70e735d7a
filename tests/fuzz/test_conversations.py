"""Records in any JSON: a conversation or a bad sample; a source of any bytes: records or an error of ours."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as arrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from eqat_mm.data.image_text import record_sources as module
from eqat_mm.data.image_text.conversations import IMAGE, Conversation
from eqat_mm.data.image_text.samples import image_text_data
from eqat_mm.data.image_text.settings import ImageTextData
from tests.data.records import read_records
from tests.data.tiny_processor import llava_processor
from tests.fuzz.allowed import only_our_errors
from tests.fuzz.damage import damaged
from tests.fuzz.values import json_texts, json_values, words

_GOOD = [
    {
        "id": 7,
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a"}],
    },
    {"conversations": [{"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}]},
]
_SPECIAL = [IMAGE, "</s>", "<s>", "[INST]", "<|end|>", "{{ 1 / 0 }}", "{% raw %}", "a" * 5000, " ", "\n"]

_text = words | st.lists(st.sampled_from([*_SPECIAL, "a", "b c"]), max_size=5).map("".join)
_turn = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "human", "gpt", "system", "user", "tool"]), "value": _text}
)
_name = st.sampled_from(["a.png", "a.png", "cut.jpg", "pipe.png", "gone.png", ".", "../a.png", "/a.png", "a.png/b", ""])
_image = _name | words | st.lists(_name | json_values, max_size=3) | json_values
_record = st.fixed_dictionaries(
    {}, optional={"image": _image, "conversations": st.lists(_turn, max_size=4) | json_values, "id": json_values}
)
_dialogue = st.builds(
    lambda question, answer: [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], _text, _text
)
_likely = st.fixed_dictionaries({"conversations": _dialogue}, optional={"image": _image})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images: a good one, one cut off, a pipe; records go to `records.json`."""
    folder = tmp_path_factory.mktemp("records")
    Image.effect_noise((40, 30), 50).save(folder / "a.png")
    Image.effect_noise((64, 64), 50).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-500])
    os.mkfifo(folder / "pipe.png")
    return folder


@given(
    data=st.binary()
    | json_texts.map(lambda text: text.encode(errors="surrogatepass"))
    | damaged(st.just(json.dumps(_GOOD).encode())),
    suffix=st.sampled_from([".json", ".jsonl"]),
)
def test_a_source_of_any_bytes(folder: Path, data: bytes, suffix: str) -> None:
    path = folder / f"any{suffix}"
    path.write_bytes(data)
    with only_our_errors():
        records = read_records(str(path))
        for index in range(len(records)):
            with only_our_errors():
                assert isinstance(records.conversation(index), Conversation)


@given(record=_record | _likely | json_values)
def test_a_record_of_any_fields(folder: Path, record: Any) -> None:
    (folder / "one.json").write_text(json.dumps([record]))
    records = read_records(str(folder / "one.json"))
    with only_our_errors():
        conversation = records.conversation(0)
        assert sum(turn.text.count(IMAGE) for turn in conversation.turns) == len(conversation.images)
        hash(conversation.images)


@given(records=st.lists(_likely | _record, max_size=6), check=st.sampled_from(["header", "decode"]))
def test_samples_are_encoded_or_skipped(folder: Path, records: list[Any], check: Any) -> None:
    (folder / "some.json").write_text(json.dumps([*_GOOD, *records]))
    config = ImageTextData(str(folder / "some.json"), max_length=200, on_bad_sample="skip", max_skipped=1, check=check)
    with only_our_errors():
        data = image_text_data(llava_processor(), config, folder / "problems.jsonl")
        for index in range(len(data)):
            assert len(data[index]["input_ids"]) <= 200


_strings = st.none() | st.text(max_size=5) | st.just("human") | st.just("gpt")
_cells = st.one_of(
    st.none(),
    st.lists(st.fixed_dictionaries({"from": _strings, "value": _strings}), max_size=3),
)


@given(
    turns=st.lists(_cells, min_size=1, max_size=3),
    image=st.sampled_from(
        [
            None,
            arrow.string(),
            arrow.int64(),
            arrow.list_(arrow.string()),
            arrow.struct({"path": arrow.string()}),
            arrow.struct({"bytes": arrow.binary(), "path": arrow.string()}),
            arrow.struct({"bytes": arrow.string()}),
        ]
    ),
    data=st.data(),
)
def test_rows_of_a_data_set(folder: Path, turns: list[Any], image: Any, data: st.DataObject) -> None:
    kind = arrow.list_(arrow.struct({"from": arrow.string(), "value": arrow.string()}))
    columns: dict[str, Any] = {"conversations": arrow.array(turns, kind)}
    if image is not None:
        cell = {
            "int64": st.integers(0, 9),
            "string": st.text(max_size=3) | st.just("a.png"),
            "list<item: string>": st.lists(st.just("a.png"), max_size=2),
        }.get(str(image), st.fixed_dictionaries({"path": st.just("/a.png"), "bytes": st.sampled_from([b"x", None])}))
        cells = data.draw(st.lists(st.none() | cell, min_size=len(turns), max_size=len(turns)))
        columns["image"] = arrow.array(cells, image)
    table = datasets.Dataset(arrow.table(columns))
    with pytest.MonkeyPatch.context() as patch, only_our_errors():
        patch.setattr(module, "load_hub", lambda source: table)
        records = read_records("hf:name", folder)
        for index in range(len(records)):
            with only_our_errors():
                hash(records.conversation(index).images)
