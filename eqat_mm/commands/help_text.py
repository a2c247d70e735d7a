"""What `--help` of a command says: every option with what it does, what it takes and its default here."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eqat_mm.commands.outline import Option

_WIDEST = 120
_NAMES = 34


def help_of(command: str, about: str, options: Sequence[Option], settings: Mapping[str, Any], line: str) -> str:
    """Return the help of a command.

    Args:
        command: its name.
        about: what it does.
        options: all.
        settings: of the recipe that it would take, nested: they stand for the defaults.
        line: what is said of that recipe; empty without one.
    """
    model = " [MODEL]" if any(option.name == "model" for option in options) else ""
    head = [
        f"usage: eqat {command}{model} [--config RECIPE] [--option VALUE ...]",
        "",
        _sentence(about),
    ]
    own = [option for option in options if option.own and "." not in option.name and option.kind != "settings"]
    shared = [option for option in options if not option.own and "." not in option.name and option.kind != "settings"]
    parts = [_part("", own, settings)]
    for group in (option for option in options if option.kind == "settings"):
        inner = [each for each in options if each.name.rpartition(".")[0] == group.name and each.kind != "settings"]
        parts.append(_part(f"--{group.name}: {_lowered(group.does)}", inner, settings))
    parts += [_part("training:", shared, settings)] if shared else []
    return "\n".join([*head, *([f"\n{line}"] if line else []), *parts, *_foot(command)])


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."


def _lowered(words: str) -> str:
    return words[:1].lower() + words[1:] if words[1:2].islower() else words


def _part(title: str, options: Sequence[Option], settings: Mapping[str, Any]) -> str:
    rows = [row for option in options for row in _rows(option, settings)]
    return "\n".join(["", *textwrap.wrap(title, _width()), *rows])


def _rows(option: Option, settings: Mapping[str, Any]) -> Iterator[str]:
    given = _looked_up(settings, option.name)
    default = option.default if given is None else given
    words = "required" if option.required and given is None else f"default {_told(default)}"
    name = f"  --{option.name}"
    text = f"{option.does.rstrip('.')}. [{option.takes}; {words}]" if option.does else f"[{option.takes}; {words}]"
    lines = textwrap.wrap(text, _width() - _NAMES, break_on_hyphens=False)
    if len(name) < _NAMES:
        yield name.ljust(_NAMES) + lines.pop(0)
    else:
        yield name
    yield from (" " * _NAMES + line for line in lines)


def _told(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return "empty" if value in ([], "") else str(value)


def _looked_up(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return settings


def _width() -> int:
    return min(shutil.get_terminal_size().columns, _WIDEST)


def _foot(command: str) -> list[str]:
    return [
        "",
        "  --config RECIPE",
        "        YAML file, or name of a recipe (eqat recipes). Flags win over it, wherever they stand.",
        "  --print_config",
        "        Print all settings as YAML, and end.",
        "",
        f"With a model, `eqat {command} MODEL --help`, the defaults are those of its recipe.",
    ]
