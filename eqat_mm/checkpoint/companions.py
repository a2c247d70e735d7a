"""Files that come with a model: tokenizer, processor, chat templates, generation settings, licences.

They are copied by an allow-list, because a model folder may hold anything: other people's adapters, training states,
links to files elsewhere, pipes.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

from eqat_mm.runtime.files import atomic_path

TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*", "*.model", "*.tiktoken"),
    *("tekken.json", "normalizer.json"),
)
"""Patterns of a tokenizer's files."""

PROCESSOR = ("*processor_config.json",)
"""Patterns of what a processor has beside its tokenizer."""

DECIDING = (
    *("generation_config.json", "*.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *(*PROCESSOR, *TOKENIZER),
)
"""Patterns of the files that decide what a model is asked and what it answers."""

_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def files_like(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Return the names of the files of a folder that a pattern fits, relative to it, in order."""
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path.relative_to(folder).as_posix() for path in found if path.is_file())


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what comes with the model in `source`, byte for byte; what lies elsewhere is left out with a warning."""
    found = {path for pattern in (*DECIDING, *_LICENCES) for path in source.glob(pattern)}
    for path in sorted(path for path in found if not path.is_dir()):
        if not _belongs(path, source):
            warnings.warn(f"{path} is not copied: it is a link out of its folder, or no plain file", stacklevel=2)
            continue
        with atomic_path(folder / path.relative_to(source)) as temporary:
            shutil.copyfile(path, temporary)


def _belongs(path: Path, source: Path) -> bool:
    """Whether this is a plain file of the folder; the cache of the hub keeps its files in `blobs`, beside snapshots."""
    root, real = source.resolve(), path.resolve()
    roots = [root, *([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])]
    return real.is_file() and any(real.is_relative_to(allowed) for allowed in roots)
