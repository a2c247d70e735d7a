"""Recipes as text: YAML in UTF-8, read so that what is wrong in it is said and nothing in it is overlooked."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import _loaders_dumpers as jsonargparse_loaders

from eqat_mm.errors import ConfigError
from eqat_mm.runtime.settings import Settings, hints_of, settings_in, shown

_DEEPEST = 16


class RecipeLoader(yaml.SafeLoader):
    """YAML as jsonargparse reads it, in Python: libyaml crashes on text that is nested deeply.

    Keys that come twice, aliases, and values that cannot be read are refused. `None` is null, too: jsonargparse makes
    it of a null within a group that may itself be null.
    """

    yaml_implicit_resolvers = jsonargparse_loaders.get_yaml_default_loader().yaml_implicit_resolvers  # type: ignore[no-untyped-call]
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node, unless it is an alias or lies too deep."""
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias; write the value out", mark)
        if self._depth == _DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"nested more than {_DEEPEST} levels deep", mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Construct a mapping whose keys differ."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} comes twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Construct what a node stands for, if it does."""
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            what = "a value that cannot be read"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from error


RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^None$"), ["N"])
jsonargparse_loaders.yaml_default_loader = RecipeLoader  # type: ignore[assignment]  # for values of flags, too


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file; those in files that it names stay names.

    Raises:
        ConfigError: unreadable, not UTF-8, not YAML, or no settings by name.
    """
    try:
        settings = yaml.load(path.read_text(encoding="utf-8-sig"), RecipeLoader)  # it is a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            where=f"--config {path}",
            given=_what(error),
            allowed="YAML in UTF-8, every setting once",
            do="correct it; `--print_config` shows every option with its value",
        ) from error
    if not isinstance(settings, dict):
        raise ConfigError(
            where=f"--config {path}",
            given=shown(settings),
            allowed="settings by name, such as `batch_size: 4`",
            do="correct it; `--print_config` shows every option with its value",
        )
    return settings


def read_value(text: str) -> Any:
    """Return what YAML makes of the value of a flag; None where it is none."""
    try:
        return yaml.load(text, RecipeLoader)  # it is a SafeLoader
    except yaml.YAMLError:
        return None


def check_names(kind: type[Settings], settings: Mapping[Any, Any], path: Path, under: str = "") -> None:
    """Check that settings are those of a job, also where a recipe names another file for some of them.

    Args:
        kind: dataclass that they are for.
        settings: as read.
        path: of the file, for the message and for files beside it.
        under: what the names come after, `fit.`.

    Raises:
        ConfigError: an unknown name, or an unreadable file.
    """
    hints = hints_of(kind)
    for name, value in settings.items():
        first, _, rest = str(name).partition(".")
        if first not in hints:
            raise _unknown(f"{under}{name}", [under + each for each in hints], path)
        nested = settings_in(hints[first])
        if nested is None:
            continue
        beside = path.parent / value if isinstance(value, str) else None
        if rest:
            check_names(nested, {rest: value}, path, f"{under}{first}.")
        elif isinstance(value, Mapping):
            check_names(nested, value, path, f"{under}{name}.")
        elif beside is not None and beside.is_file():
            check_names(nested, read_recipe(beside), beside)


def _unknown(name: str, known: list[str], path: Path) -> ConfigError:
    near = difflib.get_close_matches(name, known, n=1)
    return ConfigError(
        where=f"--config {path}",
        given=f"unknown setting {shown(name)}",
        allowed=", ".join(known),
        do=f"did you mean {near[0]}?" if near else "choose one of these",
    )


def _what(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem}, in line {error.problem_mark.line + 1}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start:,})"
    return " ".join(str(error).split())
