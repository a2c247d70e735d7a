"""Settings that check themselves: the type of a field says what it may hold.

A field is declared as `epochs: Count = 2`. Whoever makes the dataclass, the command line, a recipe, Python code or
`dataclasses.replace`, gets the same error for a value that is not allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from eqat_mm.errors import ConfigError

_LARGEST = 2**31 - 1
_LARGEST_FLOAT = 1e9
_SHOWN = 80


@dataclass(frozen=True)
class Within:
    """Numbers from `least` to `most`, both included unless they are in `without`."""

    least: float
    most: float
    without: tuple[float, ...] = ()

    def holds(self, value: Any) -> bool:
        """Whether the number is one of them; NaN never is."""
        return bool(self.least <= value <= self.most) and value not in self.without

    @property
    def words(self) -> str:
        """Say which numbers; the largest is left out where it only keeps libraries from overflowing."""
        if self.most in (_LARGEST, _LARGEST_FLOAT):
            return f"above {self.least}" if self.least in self.without else f"{self.least} or more"
        if not self.without:
            return f"{self.least} to {self.most}"
        return f"above {self.least}, " + (f"below {self.most}" if self.most in self.without else f"up to {self.most}")


@dataclass(frozen=True)
class OneOf:
    """One of a few values."""

    values: tuple[Any, ...]

    def holds(self, value: Any) -> bool:
        """Whether the value is one of them."""
        return value in self.values

    @property
    def words(self) -> str:
        """Name them."""
        return ", ".join(map(str, self.values))


@dataclass(frozen=True)
class Filled:
    """A list with something in it."""

    words: str = "one or more"

    def holds(self, value: Any) -> bool:
        """Whether there is something in it."""
        return len(value) > 0


Count = Annotated[int, Within(1, _LARGEST)]
CountOrZero = Annotated[int, Within(0, _LARGEST)]
Length = Annotated[int, Within(2, _LARGEST)]
"""Tokens, of which one predicts the next."""
Seed = Annotated[int, Within(0, 2**32 - 1)]
"""What numpy takes, through transformers."""
Positive = Annotated[float, Within(0, _LARGEST_FLOAT, without=(0,))]
PositiveOrZero = Annotated[float, Within(0, _LARGEST_FLOAT)]
Fraction = Annotated[float, Within(0, 1)]
Share = Annotated[float, Within(0, 1, without=(0, 1))]


@dataclass(frozen=True)
class Settings:
    """Base of dataclasses whose fields are checked whenever one is made.

    `class FitConfig(Settings, option="fit")` says that its fields are the options `--fit.NAME` of a command.

    Raises:
        ConfigError: a value that its field cannot hold, or values that cannot go together.
    """

    option: ClassVar[str] = ""

    def __init_subclass__(cls, option: str | None = None, **kwargs: Any) -> None:
        """Note under which option the fields are."""
        super().__init_subclass__(**kwargs)
        if option is not None:
            cls.option = f"{option}."

    def __post_init__(self) -> None:
        """Check every field, then all of them together."""
        for name, hint in hints_of(type(self)).items():
            require(hint, getattr(self, name), f"--{self.option}{name}")
        self.check_together()

    def check_together(self) -> None:
        """Check what single fields cannot say; nothing by default."""


def hints_of(kind: type[Any]) -> dict[str, Any]:
    """Return the type of every field of a dataclass by name, with what limits it."""
    return _hints_of(kind)  # type: ignore[arg-type]  # a class is hashable


@cache
def _hints_of(kind: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def settings_in(hint: Any) -> type[Settings] | None:
    """Return the dataclass of settings that a field holds, always or where it is not null; None where it holds none."""
    for each in (hint, *get_args(hint)):
        if isinstance(each, type) and issubclass(each, Settings):
            return each
    return None


def settings_listed(hint: Any) -> type[Settings] | None:
    """Return the dataclass of settings of which a field may hold a list; None where it may not."""
    lists = (each for each in _alternatives(hint) if get_origin(each) is list)
    return next((kind for each in lists if (kind := settings_in(get_args(each)[0])) is not None), None)


def require(hint: Any, value: Any, option: str) -> None:
    """Check that a field may hold `value`.

    Args:
        hint: its type.
        value: any.
        option: its name, for the message.

    Raises:
        ConfigError: it may not.
    """
    if not _holds(hint, value):
        raise ConfigError(option, shown(value), allowed_by(hint, value), _advice(hint, value, option))


def shown(value: Any) -> str:
    """Return a value as a short text without line breaks."""
    if isinstance(value, int) and value.bit_length() > _SHOWN * 3:
        return f"a number of about {value.bit_length() * 3 // 10:,} digits"
    text = "null" if value is None else repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}...{text[-_SHOWN // 4 :]}"


def allowed_by(hint: Any, value: Any = None) -> str:
    """Say what a field may hold; with the largest number where `value` is above it."""
    kinds = [_kind(each, value) for each in _alternatives(hint) if each is not NoneType]
    return " or ".join(kinds) + (", or null" if NoneType in _alternatives(hint) else "")


def limits_in(hint: Any) -> Iterator[Any]:
    """Yield what limits the values of a field."""
    for each in _alternatives(hint):
        if get_origin(each) is Annotated:
            yield from get_args(each)[1:]


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _holds(hint: Any, value: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_holds(part, value) for part in parts)
    if origin is Annotated:
        return _holds(parts[0], value) and all(limit.holds(value) for limit in parts[1:])
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in parts)
    if origin in (tuple, list):
        return isinstance(value, tuple | list) and all(_holds(parts[0], each) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(_holds(parts[0], key) and _holds(parts[1], value[key]) for key in value)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    if hint in (str, Path):
        return isinstance(value, hint) and is_text(str(value))
    return isinstance(value, hint)


def is_text(value: str) -> bool:
    """Whether a string can be printed, stored and used as the name of a file."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def _kind(hint: Any, value: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(map(str, parts))
    if origin in (tuple, list):
        return f"a list of: {allowed_by(parts[0])}"
    if origin is Annotated:
        return _limited(parts[0], parts[1], value)
    if settings_in(hint) is not None:
        return "settings by name"
    return {bool: "true or false", str: "text", Path: "a path", int: "an integer", float: "a number"}[hint]


def _limited(base: Any, limit: Any, value: Any) -> str:
    if isinstance(limit, OneOf):
        return limit.words
    if isinstance(limit, Filled):
        return f"{limit.words} of: {allowed_by([kind for kind in get_args(base) if kind is not ...][-1])}"
    noun = "an integer" if base is int else "a number"
    joint = " of " if limit.words.endswith("more") else ", " if limit.words[0].isdigit() else " "
    capped = _is_number(value) and value > limit.most and str(limit.most) not in limit.words
    return f"{noun}{joint}{limit.words}" + (f", up to {limit.most:,.0f}" if capped else "")


def _advice(hint: Any, value: Any, option: str) -> str:
    limit = next(iter(limits_in(hint)), None)
    if isinstance(limit, Within) and _is_number(value):
        verb = "lower" if value > limit.least else "raise"
        return f"{verb} {option}" + (", or leave it out" if NoneType in _alternatives(hint) else "")
    choices = [str(c) for each in _alternatives(hint) if get_origin(each) is Literal for c in get_args(each)]
    near = difflib.get_close_matches(shown(value).strip("'"), choices, n=1)
    if near:
        return f"did you mean {option} {near[0]}?"
    return f"set {option} to one of these" if choices or isinstance(limit, OneOf) else f"correct {option}"


def _is_number(value: Any) -> bool:
    """Whether it is a number that can be compared with others."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
