"""The options of a command: their names, what they take, what they do, and their defaults.

They follow from the command's dataclass. Importing that means importing torch and transformers, which takes seconds; so
what follows is also kept in `options.json`, with a hash of the sources that it was made of. Help and the answer to a
mistyped option come from there, as long as the hash is right. `make options` writes the file.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from eqat_mm.runtime.settings import Settings, allowed_by, hints_of, settings_in, settings_listed

OPTIONS_FILE = Path(__file__).with_name("options.json")
_PACKAGE = Path(__file__).parents[2]

Kind = Literal["value", "flag", "list", "place", "settings"]


@dataclass(frozen=True)
class Option:
    """One option, or the group of options that begin with its name.

    Attributes:
        name: `fit.epochs`.
        kind: `flag` is true or false, `list` may be given several times, `place` is a path, `settings` a group.
        takes: which values, in words.
        does: what it does, as a sentence.
        default: of the dataclass, as JSON has it.
        required: it has no default.
    """

    name: str
    kind: Kind
    takes: str
    does: str
    default: Any
    required: bool


def options_of(kind: type[Settings], under: str = "", default: Any = None) -> Iterator[Option]:
    """Yield the options of a job, those that commands declare first; those of a group behind the group.

    Args:
        kind: dataclass of settings.
        under: what their names come after, `fit.`.
        default: instance with their defaults; None takes those of the fields.
    """
    hints, does, commands = hints_of(kind), _described(kind), _of_commands(kind)
    for field in sorted(fields(kind), key=lambda field: field.name not in commands):
        hint = hints[field.name]
        value = _default(field) if default is None else getattr(default, field.name)
        shown = None if value is MISSING or isinstance(value, Settings) else _plain(value)
        name, words = under + field.name, does.get(field.name, "")
        yield Option(name, _kind_of(hint), allowed_by(hint), words, shown, value is MISSING)
        nested = settings_in(hint)
        if nested is not None:
            yield from options_of(nested, f"{name}.", value if isinstance(value, Settings) else None)


def _of_commands(kind: type[Settings]) -> set[str]:
    """Return the fields that commands declare, their trainers' own left out."""
    kinds = [each for each in kind.__mro__ if each.__module__.startswith("eqat_mm.commands.")]
    return {name for each in kinds or [kind] for name in vars(each).get("__annotations__", {})}


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _kind_of(hint: Any) -> Kind:
    inside = (hint, *get_args(hint))
    if settings_in(hint) is not None:
        return "settings"
    if hint is bool:
        return "flag"
    if any(get_origin(each) is list for each in inside) and settings_listed(hint) is None:
        return "list"
    return "place" if Path in inside else "value"


def _described(kind: type[Settings]) -> dict[str, str]:
    """Return what docstrings say of each field, as sentences."""
    from docstring_parser import parse

    found = {}
    for base in reversed(kind.__mro__):
        for entry in parse(base.__doc__ or "").params if issubclass(base, Settings) else ():
            found[entry.arg_name] = _sentence(entry.arg_name, " ".join((entry.description or "").split()))
    return found


def _sentence(name: str, words: str) -> str:
    """Return words that begin with their verb or `of` as a sentence."""
    if words.startswith("of "):
        words = f"{name.replace('_', ' ')} {words}"
    first = words.partition(" ")[0].rstrip(",;").replace("-", "")
    return words[:1].upper() + words[1:] if first.isalpha() else words


# What is kept.


def stored_options(command: str) -> list[Option] | None:
    """Return the options of a command as they are kept; None where the sources have changed since."""
    try:
        kept = json.loads(OPTIONS_FILE.read_text(encoding="utf-8"))
        rows = kept["commands"][command] if kept["hash"] == _hash_of(kept["sources"]) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return None if rows is None else [Option(*row) for row in rows]


def _hash_of(sources: Sequence[str]) -> str:
    return hashlib.sha256(b"".join((_PACKAGE / name).read_bytes() for name in sources)).hexdigest()


def outline(kinds: Mapping[str, type[Settings]]) -> str:
    """Return what is to be kept of jobs, one option a line."""
    rows = {name: [list(asdict(option).values()) for option in options_of(kind)] for name, kind in kinds.items()}
    sources = sorted({_source(part) for kind in kinds.values() for part in _parts(kind)})
    lines = (f"{json.dumps(name)}: [\n{_joined(map(json.dumps, each))}\n]" for name, each in rows.items())
    head = f'"hash": "{_hash_of(sources)}",\n"sources": {json.dumps(sources)}'
    return f'{{\n{head},\n"commands": {{\n{_joined(lines)}\n}}\n}}\n'


def _joined(lines: Any) -> str:
    return ",\n".join(lines)


def _parts(kind: type[Settings]) -> Iterator[type[Settings]]:
    """Yield the dataclasses that a job is made of."""
    yield from (base for base in kind.__mro__ if issubclass(base, Settings))
    for hint in hints_of(kind).values():
        nested = settings_in(hint)
        if nested is not None:
            yield from _parts(nested)


def _source(kind: type[Settings]) -> str:
    return Path(str(sys.modules[kind.__module__].__file__)).relative_to(_PACKAGE).as_posix()
