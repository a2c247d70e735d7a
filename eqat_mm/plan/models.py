"""Configurations that are shipped, so that a model can be planned before anything of it is downloaded."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from eqat_mm.runtime.plugins import plugged_folders
from llava_adapters.aliases import ALIASES

_SAME_SHAPE = {
    "vicuna-7b": "llama-2-7b",
    "vicuna-13b": "llama-2-13b",
    "llama-3-8b": "llama-3.1-8b",
    "llama-3.1-8b-instruct": "llama-3.1-8b",
    "llama-3-70b": "llama-3.1-70b",
    "llava-v1.6-34b": "llava-1.6-34b",
}
"""Alias -> shipped configuration whose sizes are the same; only those in this table and the file names are known."""


def shipped_config(model: str) -> dict[str, Any] | None:
    """Return the config.json that is shipped for a name, an alias or a hub repository; None where there is none."""
    alias = {repository: name for name, repository in ALIASES.items()}.get(model, model)
    file = _files().get(_SAME_SHAPE.get(alias, alias))
    return None if file is None else dict(json.loads(file.read_text("utf-8")))


def _files() -> dict[str, Path]:
    folders = (Path(str(files("eqat_mm.plan"))) / "configs", *plugged_folders("configs"))
    return {path.stem: path for folder in folders for path in folder.glob("*.json")}
