"""A stand-in for LLaVA-1.5's instruction mix: as many records, as long, in the published layout, about few images.

    python benchmarks/instruction_mix.py FOLDER [--records 665298] [--images 200] [--odd] [--text demo-wikipedia]

FOLDER gets `mix.json` and `images/`. Words are those of a text, by default Wikipedia's lead sections: natural work for
a tokenizer.
Of the records 6% are long talks without an image, 30% two or three long answers, the others up to fourteen short ones.
`--odd` adds, one in a thousand each, what the published data have: a first turn by the model, several `<image>` for one
image, a literal `<image>` in a text, an image without `<image>`, two images, a missing image, and more than 2,048
tokens. Of the images one is then an empty file, and one was cut off in the middle.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eqat_mm.data.text.documents import load_documents

RECORDS = 665_298
SHORT = "Answer the question using a single word or phrase."
FOLDERS = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K")

Record = dict[str, Any]


def write_mix(folder: Path, records: int, images: int, *, odd: bool = False, text: str = "demo-wikipedia") -> Path:
    """Write `mix.json` with its images below `folder`; return the file."""
    names = _images(folder / "images", images)
    if odd:
        _damage(folder / "images" / names[0], folder / "images" / names[1])
    words = " ".join(load_documents(text)).split()
    draw = random.Random(0)
    file = folder / "mix.json"
    with file.open("w", encoding="utf-8") as out:
        for index, record in enumerate(_records(words, names, records, draw, odd)):
            out.write(("[" if index == 0 else ", ") + json.dumps(record))
        out.write("]")
    return file


def _images(folder: Path, count: int) -> list[str]:
    noise = np.random.default_rng(0)
    names = []
    for index in range(count):
        name = f"{FOLDERS[index % len(FOLDERS)]}/{index:012}.jpg"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        small = noise.integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(small).resize((640, 480) if index % 3 else (333, 500)).save(folder / name)
        names.append(name)
    return names


def _damage(emptied: Path, cut: Path) -> None:
    emptied.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])


def _records(words: list[str], names: list[str], count: int, draw: random.Random, odd: bool) -> Iterator[Record]:
    for index in range(count):
        record = _record(words, names, index, draw)
        yield _odd(record, words, names, draw) if odd and draw.random() < 0.007 else record


def _record(words: list[str], names: list[str], index: int, draw: random.Random) -> Record:
    kind = draw.random()
    if kind < 0.06:
        pairs = [(40, 180)] * draw.randint(1, 5)
    elif kind < 0.36:
        pairs = [(14, 150)] * draw.randint(2, 3)
    else:
        pairs = [(9, 2)] * draw.randint(1, 14)
    turns = [(_text(words, asked, draw), _text(words, told, draw)) for asked, told in pairs]
    record: Record = {"id": f"{index:012}"}
    if kind >= 0.06:
        record["image"] = draw.choice(names)
        question = f"<image>\n{turns[0][0]}" if draw.random() < 0.5 else f"{turns[0][0]}\n<image>"
        turns[0] = (question if kind < 0.36 else f"{question}\n{SHORT}", turns[0][1])
    who = (("human", "gpt")[at % 2] for at in range(2 * len(turns)))
    said = (text for turn in turns for text in turn)
    return record | {"conversations": [{"from": each, "value": text} for each, text in zip(who, said, strict=True)]}


def _text(words: list[str], most: int, draw: random.Random) -> str:
    length = draw.randint(max(1, most // 2), most + most // 2)
    start = draw.randrange(len(words) - length)
    return " ".join(words[start : start + length])


def _odd(record: Record, words: list[str], names: list[str], draw: random.Random) -> Record:
    turns = record["conversations"]
    if "image" not in record:
        turns[0]["value"] += " write <image> for a picture"
        return record
    match draw.randrange(6):
        case 0:
            turns.insert(0, {"from": "gpt", "value": "Hello!"})
        case 1:
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        case 2:
            turns[0]["value"] = turns[0]["value"].replace("<image>", "")
        case 3:
            record["image"] = f"gone/{record['id']}.jpg"
        case 4:
            record["image"] = [record["image"], draw.choice(names)]
            turns[0]["value"] += "\nand <image>"
        case _:
            turns[-1]["value"] = _text(words, 2000, draw)
    return record


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=RECORDS)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--odd", action="store_true")
    parser.add_argument("--text", default="demo-wikipedia")
    given = parser.parse_args()
    print(write_mix(given.folder, given.records, given.images, odd=given.odd, text=given.text))
