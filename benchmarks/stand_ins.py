"""What a practitioner's day begins with, small: a released LLaVA, its instruction mix, a dump of text, a photo, a task.

    python benchmarks/stand_ins.py FOLDER [--records 20000] [--images 200] [--text demo-wikipedia]

FOLDER gets `hf/`, a cache of the hub (`HF_HOME`) with a tiny LLaVA in the published layout (`released_llava.py`);
`data/llava_v1_5_mix665k.json` and `data/llava-images/`, with the trouble that the published data have
(`instruction_mix.py`); `texts/`, in files like C4's; `photo.jpg`; and `questions.parquet`, a task in easy-VQA's layout.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
from pathlib import Path

import pyarrow
from instruction_mix import write_mix
from PIL import Image
from pyarrow import parquet
from released_llava import write_released

from eqat_mm.data.text.documents import load_documents

DUMPS = 3
QUESTIONS = 8


def write_stand_ins(folder: Path, records: int, images: int, text: str) -> None:
    """Write everything into a folder.

    Args:
        folder: to be made.
        records: of the instruction mix.
        images: that they are about.
        text: that all words come from.
    """
    write_released(folder / "hf" / "hub", text)
    data = folder / "data"
    data.mkdir()
    write_mix(data, records, images, odd=True, text=text).rename(data / "llava_v1_5_mix665k.json")
    (data / "images").rename(data / "llava-images")
    _write_dump(folder / "texts" / "en", text)
    _write_questions(folder / "questions.parquet")
    _photo(90).save(folder / "photo.jpg")


def _write_dump(folder: Path, text: str) -> None:
    """Write text as C4 is published: compressed files with a record a line."""
    folder.mkdir(parents=True)
    documents = list(load_documents(text))
    for number in range(DUMPS):
        with gzip.open(folder / f"c4-train.{number:05}-of-01024.json.gz", "wt", encoding="utf-8") as out:
            for said in documents[number::DUMPS]:
                out.write(
                    json.dumps({"text": said, "timestamp": "2019-04-25T12:57:54Z", "url": "https://a.b/c"}) + "\n"
                )


def _photo(shade: int) -> Image.Image:
    return Image.linear_gradient("L").point(lambda value: (value + shade) % 256).resize((640, 480)).convert("RGB")


def _write_questions(file: Path) -> None:
    rows = []
    for number in range(QUESTIONS):
        image = io.BytesIO()
        _photo(30 * number).save(image, "PNG")
        asked = {"question": "What is it?", "answer": "a cat", "type": "colour"}
        rows.append({"question_id": f"{number}", "image": image.getvalue()} | asked)
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--text", default="demo-wikipedia")
    given = parser.parse_args()
    write_stand_ins(given.folder, given.records, given.images, given.text)
