"""Questions about images as files: records in LLaVA's format to train on, a parquet file to be asked."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eqat_mm.runtime.files import atomic_path
from eqat_mm.runtime.seeding import derive_seed

_BEFORE = "<image>\n"


def record(name: str, image: str, question: str, answer: str, kind: str) -> dict[str, Any]:
    """Return one question in LLaVA's format, with its type beside.

    Args:
        name: of the question.
        image: path of the image, relative to the file of records.
        question: as it is asked.
        answer: in full.
        kind: type of the question.
    """
    turns = [{"from": "human", "value": f"{_BEFORE}{question}"}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns, "type": kind}


def write_parquet(folder: Path, records: Iterable[dict[str, Any]], order: str) -> None:
    """Write `test.parquet`: question_id, image (bytes of a PNG file), question, answer and type, shuffled.

    Args:
        folder: that holds the images, and gets the file.
        records: of `record`.
        order: names the order, which is always the same: so the first n questions are a fair sample of all.
    """
    import pyarrow as arrow
    from pyarrow import parquet

    ordered = sorted(records, key=lambda each: derive_seed(0, order, each["id"]))
    rows = [
        {
            "question_id": each["id"],
            "image": (folder / each["image"]).read_bytes(),
            "question": each["conversations"][0]["value"].removeprefix(_BEFORE),
            "answer": each["conversations"][1]["value"],
            "type": each["type"],
        }
        for each in ordered
    ]
    with atomic_path(folder / "test.parquet") as temporary:
        parquet.write_table(arrow.Table.from_pylist(rows), temporary)
