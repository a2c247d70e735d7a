"""From what a user typed to the job of a command: every value allowed, or four lines."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from eqat_mm.errors import ConfigError, EqatError
from eqat_mm.runtime.settings import (
    Settings,
    allowed_by,
    hints_of,
    is_text,
    require,
    settings_in,
    settings_listed,
    shown,
)

Job = TypeVar("Job", bound=Settings)

_RAISED = (ArgumentError, ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What jsonargparse lets out, over values that it did not expect."""


def names_of(kind: type[Settings], under: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the name of every option of a job, `fit.epochs`, with its type."""
    for name, hint in hints_of(kind).items():
        yield under + name, hint
        nested = settings_in(hint)
        if nested is not None:
            yield from names_of(nested, f"{under}{name}.")


def parsed(parser: ArgumentParser, command: str, kind: type[Job], argv: Sequence[str]) -> Job:
    """Return the job that a parser reads from its arguments.

    Raises:
        ConfigError: a value that is not allowed.
        SystemExit: after --print_config.
    """
    try:
        values = parser.parse_args(list(argv))
    except _RAISED as error:
        raise _refused(command, kind, error) from error
    return built(kind, values)


def built(kind: type[Job], values: Namespace, under: str = "") -> Job:
    """Return the dataclass with these values.

    Args:
        kind: dataclass of settings.
        values: of its fields; those of dataclasses in it are namespaces.
        under: option that it is the value of, `fit.`.

    Raises:
        ConfigError: a value that is not allowed, with the option as a user types it.
    """
    given = {}
    for name, hint in hints_of(kind).items():
        value, nested = values[name], settings_in(hint)
        if nested is not None and isinstance(value, Namespace):
            value = built(nested, value, f"{under}{name}.")
        listed = settings_listed(hint)
        if listed is not None and isinstance(value, list):
            value = [built(listed, each, f"{under}{name}.") if isinstance(each, Namespace) else each for each in value]
        given[name] = _at_home(value, name)
    try:
        return kind(**given)
    except ConfigError as error:
        said = [text.replace(f"--{kind.option}", f"--{under}") for text in (error.where, error.do)]
        raise ConfigError(said[0], error.given, error.allowed, said[1]) from error


def _at_home(value: Any, name: str) -> Any:
    """Return the value of an option: of a path with `~` replaced, of a model with a name to call its runs by."""
    if isinstance(value, Path):
        return Path(os.path.expanduser(value)) if is_text(str(value)) else value
    if name not in ("model", "reference") or not isinstance(value, str) or not is_text(value):
        return value
    value = os.path.expanduser(value)
    return os.path.abspath(value) if Path(value).name in ("", "..") else value


def _refused(command: str, kind: type[Settings], error: Exception) -> EqatError:
    """Return what a user is told where the parser refuses something."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, EqatError):
            return cause
        cause = cause.__cause__ or cause.__context__
    message = " ".join(str(error).encode("utf-8", "backslashreplace").decode().split())
    hints = dict(names_of(kind))
    found = re.search(r'[Kk]ey "([\w.]+)"', message)
    values = re.findall(r'(?:(?:Given|Got) value: |load config ")(.*?)"?$', str(error), re.MULTILINE)
    if found and values and found[1] in hints:
        name, value = _innermost(found[1], values[-1])
        return _not_a_value(name, hints[name], value)
    return ConfigError(
        where=f"eqat {command}",
        given=shown(message).strip("'\""),
        allowed=f"the options of `eqat {command} --help`",
        do=f"correct it; `eqat {command} --print_config` shows every option with its value",
    )


def _innermost(name: str, value: str) -> tuple[str, str]:
    """Return the option and the value that were typed, where the parser names a group around them that may be null."""
    inner = re.fullmatch(r"NestedArg\(key='([\w.]+)', val=(.*)\)", value)
    return (f"{name}.{inner[1]}", inner[2].strip("'")) if inner else (name, value)


def _not_a_value(name: str, hint: Any, value: str) -> ConfigError:
    nested = settings_in(hint)
    if nested is not None:
        first = next(iter(hints_of(nested)))
        given = f"no --{name}.{first}" if value.startswith("Namespace(") else shown(value)
        return ConfigError(f"--{name}", given, f"--{name}.{first} and others", f"name one: --{name}.{first} ...")
    try:
        require(hint, None if value == "None" else value, f"--{name}")
    except ConfigError as refusal:
        return refusal
    return ConfigError(f"--{name}", shown(value), allowed_by(hint), f"correct --{name}")
