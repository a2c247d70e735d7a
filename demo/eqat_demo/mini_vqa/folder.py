"""mini-VQA as a folder in the asset cache, laid out as that of easy-VQA.

`images/`, `train.json` in LLaVA's format, and `test.parquet` with the columns question_id, image (bytes of a PNG file),
question, answer and type, its rows shuffled, always in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eqat_demo.assets import asset_cache, building, is_finished
from eqat_demo.mini_vqa.pictures import PARTS, Counts, Part, pictures
from eqat_demo.question_files import record, write_parquet
from eqat_mm.runtime.files import write_json, write_text
from eqat_mm.runtime.progress import progress, say

_LAYOUT = 3  # raise it whenever the folder changes: old ones are then made anew
_NOTE = """# mini-VQA

Questions about drawn scenes, words and bar charts, made by `eqat_demo.mini_vqa` from a seed. Licence: Apache-2.0.
"""


def mini_vqa_folder(cache: Path | None = None, parts: Mapping[Part, Counts] = PARTS) -> Path:
    """Return the folder with mini-VQA, making it on the first call (a minute); see the module.

    Args:
        cache: folder of all assets, instead of `asset_cache()`.
        parts: how many pictures each part has.
    """
    origin = f"{dict(parts)} layout:{_LAYOUT}"
    folder = (cache or asset_cache()) / "mini-vqa"
    if is_finished(folder, origin):
        return folder
    say("drawing mini-VQA (once)")
    with building(folder, origin) as unfinished:
        write_json(unfinished / "train.json", _drawn(unfinished, "train", parts["train"]))
        write_parquet(unfinished, _drawn(unfinished, "test", parts["test"]), "mini-VQA test order")
        write_text(unfinished / "README.md", _NOTE)
    return folder


def training_questions() -> Path:
    """Training questions of mini-VQA about 16,000 drawn scenes, bar charts and words (Apache-2.0), 36 MB."""
    return mini_vqa_folder() / "train.json"


def _drawn(folder: Path, part: Part, counts: Counts) -> list[dict[str, Any]]:
    """Write the images of a part, and return its records."""
    images = Path("images") / part
    (folder / images).mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for number, picture in enumerate(progress(pictures(part, counts), what=f"mini-VQA {part}", total=counts.all)):
        file = images / f"{number}.png"
        picture.image().save(folder / file)
        for asked in picture.asked:
            name = f"{part}-{len(records)}"
            records.append(record(name, str(file), asked.question, asked.answer, asked.type))
    return records
