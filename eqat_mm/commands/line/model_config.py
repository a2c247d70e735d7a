"""The config.json of what a user types after --model, before anything else of the model is looked at."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from eqat_mm.plan.models import shipped_config
from llava_adapters.aliases import ALIASES

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_CONFIG = "config.json"


def config_of(model: str) -> dict[str, Any] | None:
    """Return the config.json of a model: of a folder, a run (or the only one in it), a file, an alias or a repository.

    Of a repository that is neither shipped nor in the cache, this one file is downloaded. None where there is none that
    can be read: whoever opens the model says what is wrong.
    """
    with suppress(OSError, ValueError):
        path = Path(os.path.expanduser(model))
        for file in (path, path / _CONFIG, path / "model" / _CONFIG, *_of_only_run(path)):
            if file.is_file():
                return _read(file)
        if path.is_dir():
            return None
    return shipped_config(model) or _of_repository(ALIASES.get(model, model))


def sees(*models: str) -> bool:
    """Whether a model takes images, by the first configuration that there is of what may be called by these names."""
    config = next((found for model in models if (found := config_of(model))), {})
    return "vision_config" in config


def _of_only_run(folder: Path) -> list[Path]:
    found = list(folder.glob(f"[!.]*/model/{_CONFIG}"))
    return found if len(found) == 1 else []


def _read(file: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(file.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else None
    return None


@cache
def _of_repository(name: str) -> dict[str, Any] | None:
    if not _REPOSITORY.fullmatch(name):
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    with suppress(HfHubHTTPError, HFValidationError, OSError, ValueError):
        return _read(Path(hf_hub_download(name, _CONFIG)))
    return None
