"""What all readers do: `python READER.py JOBS.json [WORD ...]`, in an environment where eqat_mm need not be.

Jobs are a JSON list. Each has at least `folder`, `inputs` and `outputs`: a folder to read, and two safetensors files,
the second of which the reader writes. Where it fails, `outputs` with `.error` behind it holds the traceback. A reader
is started once for many folders, because to import an engine takes longer than to ask it. What it has answered can be
read while it goes on.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEW, PROMPT = 8, 24
"""Tokens that are written, and how many of the first text stand before them."""


def do(answer: Callable[..., None]) -> None:
    """Let a reader answer all jobs, each with the keys of the job and the words behind it."""
    sys.modules |= dict.fromkeys(("eqat_mm", "eqat_kernels", "llava_adapters"))  # type: ignore[arg-type]  # out of reach
    jobs: list[dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for job in jobs:
        try:
            partial = f"{job['outputs']}.partial"
            answer(*sys.argv[2:], **job | {"outputs": partial})
            Path(partial).rename(job["outputs"])
        except Exception:  # noqa: BLE001 - whatever an engine makes of a folder
            Path(f"{job['outputs']}.error").write_text(traceback.format_exc(), encoding="utf-8")
        gc.collect()
