"""A hook of mkdocs: what pages link to outside docs/ comes into the site, so that one link serves it and a checkout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PLACE = "repository"
"""Folder of the site for files of the checkout."""

_OUTSIDE = re.compile(r"(?<=\]\()\.\./([\w./-]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add every file outside docs/ that a page links to."""
    pages = [page.content_string for page in files.documentation_pages()]
    for name in sorted({name for text in pages for name in _OUTSIDE.findall(text)}):
        files.append(File.generated(config, f"{PLACE}/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to files outside docs/ lead to those in the site."""
    return markdown if page.file.src_uri.startswith(PLACE) else _OUTSIDE.sub(rf"{PLACE}/\1", markdown)
