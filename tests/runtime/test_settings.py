"""Settings check themselves: every kind of field, however the dataclass is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from eqat_mm.errors import ConfigError
from eqat_mm.runtime.settings import (
    Count,
    CountOrZero,
    Filled,
    Fraction,
    OneOf,
    Positive,
    Seed,
    Settings,
    Share,
    allowed_by,
    hints_of,
    settings_in,
)
from tests.checkpoint.files import assert_four_lines


@dataclass(frozen=True)
class Inner(Settings, option="inner"):
    rate: Positive = 1.0


@dataclass(frozen=True)
class Outer(Settings):
    count: Count | None = None
    zero: CountOrZero = 0
    fraction: Fraction = 0.5
    share: Share = 0.5
    seed: Seed = 0
    width: Annotated[int, OneOf((2, 3))] = 2
    kind: Literal["ram", "disk"] = "ram"
    either: bool | Literal["auto"] = "auto"
    flag: bool = False
    text: str = ""
    path: Path | None = None
    names: tuple[str, ...] = ()
    some: Annotated[tuple[Literal[2, 3], ...], Filled()] = (2,)
    inner: Inner = field(default_factory=Inner)
    perhaps: Inner | None = None

    def check_together(self) -> None:
        if self.zero > 5 and self.flag:
            raise ConfigError("--zero", str(self.zero), "5", "lower --zero")


ALLOWED: dict[str, list[Any]] = {
    "count": [1, 2**31 - 1, None],
    "zero": [0, 7],
    "fraction": [0, 0.0, 1, 1.0],
    "share": [1e-9, 0.999],
    "seed": [0, 2**32 - 1],
    "width": [2, 3],
    "kind": ["ram", "disk"],
    "either": [True, False, "auto"],
    "flag": [True],
    "text": ["", "日"],
    "path": [Path("x"), None],
    "names": [(), ("a", "b"), ["a"]],
    "some": [(2,), [3, 2]],
    "inner": [Inner(2)],
    "perhaps": [None, Inner()],
}
REFUSED: dict[str, list[Any]] = {
    "count": [0, -1, 2**31, 10**5000, 1.0, True, "1"],
    "zero": [-1, None],
    "fraction": [-1e-9, 1.001, math.nan, math.inf, -math.inf, True, "0.5", None, 10**400],
    "share": [0, 0.0, 1, 1.0],
    "seed": [-1, 2**32],
    "width": [1, 4, 2.0, "2", True],
    "kind": ["dsk", "", None, 0],
    "either": ["always", 1, 0, None],
    "flag": [1, "true", None],
    "text": [None, 3, "\ud800", "a\0b"],
    "path": ["x", 3, Path("\udcff")],
    "names": ["ab", (1,), None],
    "some": [(), (4,), (True,)],
    "inner": [None, {"rate": 1.0}, 3],
    "perhaps": [{}, "x"],
}


def cases(values: dict[str, list[Any]]) -> Any:
    pairs = [(name, value) for name, each in values.items() for value in each]
    return pytest.mark.parametrize(("name", "value"), pairs, ids=[f"{n}-{i}" for i, (n, _) in enumerate(pairs)])


@cases(ALLOWED)
def test_what_a_field_holds(name: str, value: Any) -> None:
    assert getattr(Outer(**{name: value}), name) is value


@cases(REFUSED)
def test_what_a_field_cannot_hold(name: str, value: Any) -> None:
    for make in (lambda: Outer(**{name: value}), lambda: replace(Outer(), **{name: value})):
        with pytest.raises(ConfigError) as raised:
            make()
        assert_four_lines(raised.value)
        assert raised.value.where == f"--{name}"
        assert len(raised.value.given) <= 80
        str(raised.value).encode()


def test_every_kind_of_field_is_tried() -> None:
    assert set(hints_of(Outer)) == set(ALLOWED) == set(REFUSED)


@pytest.mark.parametrize(
    ("name", "value", "allowed", "do"),
    [
        ("count", 0, "an integer of 1 or more, or null", "raise --count, or leave it out"),
        ("count", 2**31, "an integer of 1 or more, up to 2,147,483,647, or null", "lower --count, or leave it out"),
        ("zero", "x", "an integer of 0 or more", "correct --zero"),
        ("fraction", 2.0, "a number, 0 to 1", "lower --fraction"),
        ("share", 0.0, "a number above 0, below 1", "raise --share"),
        ("width", 5, "2, 3", "set --width to one of these"),
        ("kind", "dsk", "ram, disk", "did you mean --kind disk?"),
        ("some", (), "one or more of: 2, 3", "correct --some"),
        ("names", "x", "a list of: text", "correct --names"),
    ],
)
def test_what_is_said(name: str, value: Any, allowed: str, do: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Outer(**{name: value})
    assert (raised.value.allowed, raised.value.do) == (allowed, do)


def test_a_field_of_settings_in_settings_is_named_by_its_option() -> None:
    with pytest.raises(ConfigError) as raised:
        Inner(rate=0)
    assert raised.value.where == "--inner.rate"
    assert raised.value.allowed == "a number above 0"


def test_fields_are_checked_together_once_each_is_good() -> None:
    assert Outer(zero=6).zero == 6
    with pytest.raises(ConfigError, match="lower --zero"):
        Outer(zero=6, flag=True)
    with pytest.raises(ConfigError, match="raise --zero"):
        Outer(zero=-1, flag=True)


def test_settings_in_a_field_are_found() -> None:
    hints = hints_of(Outer)
    assert settings_in(hints["inner"]) is settings_in(hints["perhaps"]) is Inner
    assert settings_in(hints["count"]) is settings_in(hints["names"]) is None
    assert allowed_by(hints["perhaps"]) == "settings by name, or null"
