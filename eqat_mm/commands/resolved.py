"""From words or from Python's keywords to the job of a command, with the recipe for its model beneath."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]

from eqat_mm.commands.options import parsed
from eqat_mm.commands.outline import Option, options_of
from eqat_mm.commands.settings_file import check_names, read_recipe
from eqat_mm.commands.taken import Taken, recipe_taken, require_model_named
from eqat_mm.commands.typed import Typed, typed
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.settings import Settings

Job = TypeVar("Job", bound=Settings)

_ONLY_TYPED = ("help", "help_all", "h", "print_config")


def job_of(command: str, kind: type[Job], words: Sequence[str], recipes_of: str | None = None) -> Job:
    """Return the job that the words behind a command describe, with the recipe for its model; say which.

    Args:
        command: its name.
        kind: dataclass of the job.
        words: what is typed behind the command.
        recipes_of: another command, whose recipe is taken, in silence.

    Raises:
        ConfigError: an unknown option, no model, or a value that is not allowed.
    """
    options = list(options_of(kind))
    found = typed(command, options, words)
    taken = recipe_taken(recipes_of or command, options, found)
    return job_with(command, kind, options, found, taken if recipes_of is None else Taken(taken.beneath))


def job_with(command: str, kind: type[Job], options: Sequence[Option], words: Typed, taken: Taken) -> Job:
    """Return the job that words describe above a recipe; say which recipe that is.

    Args:
        command: its name.
        kind: dataclass of the job.
        options: of the command.
        words: what was typed.
        taken: the recipe beneath, and what is said of it.

    Raises:
        ConfigError: no model, an unknown setting in a file, or a value that is not allowed.
        SystemExit: after --print_config.
    """
    require_model_named(command, options, words)
    for path in (each for each in words.configs if isinstance(each, Path)):
        check_names(kind, read_recipe(path), path)
    parser = ArgumentParser(prog=f"eqat {command}", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_class_arguments(kind)
    job = parsed(parser, command, kind, words.words(taken.beneath))
    if taken.line:
        say(taken.line)
    return job


def words_of(*settings: Mapping[str, Any]) -> list[str]:
    """Return settings as they are typed: `{"fit.epochs": 4}` or `{"fit": {"epochs": 4}}` as `--fit.epochs=4`.

    Args:
        settings: by the names of the options; a dataclass of settings stands for its fields.

    Raises:
        ConfigError: a setting that is given twice, or that only a command line has.
    """
    words: dict[str, str] = {}
    for name, value in (pair for each in settings for pair in _flat(each)):
        if name in words or name.replace("-", "_") in _ONLY_TYPED:
            given = f"{name} {'twice' if name in words else 'in Python'}"
            raise ConfigError("settings", given, "every setting once, by its name", f"give {name} once or not at all")
        words[name] = f"--{name}={_text(value)}"
    return list(words.values())


def _flat(settings: Mapping[str, Any], under: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        value = asdict(value) if isinstance(value, Settings) else value
        if isinstance(value, Mapping):
            yield from _flat(value, f"{under}{name}.")
        else:
            yield f"{under}{name}", value


def _text(value: Any) -> str:
    """Return a value as it is typed."""
    if isinstance(value, list | tuple):
        return json.dumps([asdict(each) if isinstance(each, Settings) else each for each in value], default=str)
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    return str(value).removeprefix("torch.")  # of a dtype
