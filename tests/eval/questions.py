"""A small parquet file in the layout of easy-VQA's, for a tiny LLaVA that knows 97 words."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pyarrow
from PIL import Image
from pyarrow import parquet

TYPES = ("colour", "shape", "yes_no", "yes_no_negated")
COUNT = 6


def images() -> list[Image.Image]:
    """Return images of one colour each."""
    return [Image.new("RGB", (16, 16), (40 * index, 255 - 40 * index, 90)) for index in range(COUNT)]


def write_questions(path: Path, types: Sequence[str] = TYPES) -> None:
    """Write questions of different lengths, and of these types in turn."""
    rows = []
    for index, image in enumerate(images()):
        file = io.BytesIO()
        image.save(file, "PNG")
        rows.append(
            {
                "question_id": f"test-{index}",
                "image": file.getvalue(),
                "question": " ".join(f"w{5 + word * (index + 1)}" for word in range(index + 1)),
                "answer": f"w{10 + index}",
                "type": types[index % len(types)],
            }
        )
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
