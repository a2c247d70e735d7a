"""A text of another kind: the source of Python's own standard library, as it is on this machine."""

from __future__ import annotations

import sysconfig
from pathlib import Path

_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def python_library() -> list[str]:
    """The modules of Python's standard library (PSF licence), one document each, of the Python that runs this.

    Figures on it compare only within one version of Python; the result's `text` tells whether the tokens are the same.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if not _NOT_THE_LIBRARY & set(path.relative_to(root).parts))
    texts = (file.read_text(encoding="utf-8", errors="ignore") for file in files)
    return [text for text in texts if text.strip()]
