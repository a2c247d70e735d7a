"""Parts of generated texts, damaged: every record that is read is the one that was written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eqat_mm.data.generated.record_parts import RecordFile, read_parts
from tests.fuzz.allowed import only_our_errors
from tests.fuzz.damage import damaged
from tests.fuzz.values import json_texts

_RECORDS = {index: {"text": f"zwei € {index}\n", "index": index, "tokens": 3, "ended": True} for index in range(6)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The lines of one part."""
    folder = tmp_path_factory.mktemp("written")
    part = RecordFile(folder, "one")
    for record in _RECORDS.values():
        part.add(record)
    return (folder / "one.jsonl").read_bytes()


@given(data=st.data())
def test_no_altered_record_is_read(
    tmp_path_factory: pytest.TempPathFactory, written: bytes, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "parts"
    folder.mkdir(exist_ok=True)
    lines = json_texts.map(lambda text: written + text.encode(errors="surrogatepass") + b"\n")
    (folder / "one.jsonl").write_bytes(data.draw(damaged(st.just(written)) | lines))
    with only_our_errors():
        for index, record in read_parts(folder, len(_RECORDS)).items():
            assert record == _RECORDS[index]
