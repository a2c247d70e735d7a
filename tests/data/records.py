"""All records of a source, in memory."""

from __future__ import annotations

from pathlib import Path

from eqat_mm.data.image_text.conversations import Records
from eqat_mm.data.image_text.record_sources import open_source


def read_records(name: str, image_folder: Path | None = None) -> Records:
    source = open_source(name, image_folder)
    return source.records(source.places())
