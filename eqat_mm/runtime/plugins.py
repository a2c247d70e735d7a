"""What other packages bring: short names of models and data, and folders of settings and tasks, by entry points.

A package declares them in its own pyproject.toml; a name is looked up when somebody types it, and only then imported:

    [project.entry-points."eqat_mm.models"]          # a function that returns the model's folder
    my-model = "my_package.models:my_model"

    [project.entry-points."eqat_mm.texts"]           # a function that returns documents, a list of strings
    my-text = "my_package.texts:documents"

    [project.entry-points."eqat_mm.conversations"]   # a function that returns a file of records in LLaVA's format
    my-talks = "my_package.talks:records"

    [project.entry-points."eqat_mm.guesses"]         # a function that returns the accuracy at a task without looking
    my_task = "my_package.task:guessed"

    [project.entry-points."eqat_mm.folders"]         # a package with recipes/*.yaml, configs/*.json and tasks/ in it
    my-package = "my_package"

The first paragraph of a function's docstring is what `eqat assets` says of its name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from eqat_mm.errors import ConfigError

log = logging.getLogger(__name__)

MODELS, TEXTS, CONVERSATIONS = "eqat_mm.models", "eqat_mm.texts", "eqat_mm.conversations"
GUESSES, FOLDERS = "eqat_mm.guesses", "eqat_mm.folders"


@cache
def plugged(group: str) -> dict[str, EntryPoint]:
    """Return what other packages registered in a group, by name; of two with one name the first serves."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        if found.setdefault(entry.name, entry).value != entry.value:
            log.warning("note: %s of the package %s is not used: its name is taken", entry.name, package_of(entry))
    return found


def package_of(entry: EntryPoint) -> str:
    """Return the name of the package that registered an entry."""
    return entry.dist.name if entry.dist is not None else "?"


def plugged_function(group: str, name: str) -> Callable[[], Any]:
    """Return the function that a package registered.

    Raises:
        ConfigError: it cannot be imported.
    """
    entry = plugged(group)[name]
    try:
        function: Callable[[], Any] = entry.load()
    except Exception as error:
        raise ConfigError(
            where=name,
            given=f"{entry.value} of the package {package_of(entry)}: {type(error).__name__}: {error}",
            allowed="a function that can be imported",
            do="install what it needs, or another version of that package",
        ) from error
    return function


@cache
def plugged_folders(name: str) -> tuple[Path, ...]:
    """Return the folders of this name in the packages that registered themselves; one that is not there is left out."""
    found = []
    for entry in plugged(FOLDERS).values():
        spec = find_spec(entry.value)
        for place in (spec.submodule_search_locations if spec else None) or ():
            found.append(Path(place) / name)
    return tuple(folder for folder in found if folder.is_dir())
