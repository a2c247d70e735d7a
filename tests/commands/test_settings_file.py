"""Recipes as text: what is wrong is said with file and line, and nothing is read as something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eqat_mm.commands.line.settings_file import check_names, read_recipe
from eqat_mm.commands.tables.ladder import LadderJob
from eqat_mm.commands.verbs.quantize import BlockAPJob
from eqat_mm.errors import ConfigError
from tests.checkpoint.files import assert_four_lines


def written(folder: Path, text: bytes) -> Path:
    file = folder / "recipe.yaml"
    file.write_bytes(text)
    return file


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        (b"\xef\xbb\xbffit: {epochs: 2}\r\nmodel: x\r\n", {"fit": {"epochs": 2}, "model": "x"}),
        (b"a: 2e-5\nb: 2.0e-3\nc: yes\nd: 2000-01-01\n", {"a": 2e-5, "b": 2e-3, "c": True, "d": "2000-01-01"}),
        ("a: é\n".encode(), {"a": "é"}),
    ],
)
def test_what_is_read(tmp_path: Path, text: bytes, settings: dict[str, Any]) -> None:
    assert read_recipe(written(tmp_path, text)) == settings


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fit: {epochs: 2}\n".encode("utf-16"), "not UTF-8 (byte 0)"),
        ("model: é\n".encode("latin-1"), "not UTF-8 (byte 7)"),
        (b"seed: 1\nmodel: x\nseed: 2\n", "'seed' comes twice, in line 3"),
        (b"fit: {epochs: 1, epochs: 2}\n", "'epochs' comes twice, in line 1"),
        (b"a: &x 1\nb: *x\n", "an alias; write the value out, in line 2"),
        (b"seed: " + b"9" * 5000, "a value that cannot be read, in line 1"),
        (b"seed: !!int ''", "a value that cannot be read, in line 1"),
        (b"a: " + b"[" * 50_000, "nested more than 16 levels deep, in line 1"),
        (b"- " * 50_000, "nested more than 16 levels deep, in line 1"),
        (b"a: !!python/object:os.system x", "could not determine a constructor"),
        (b"a: {b: 3\n", "in line"),
        (b"- 1\n- 2\n", "[1, 2]"),
        (b"", "null"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: bytes, said: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        read_recipe(file)
    assert_four_lines(raised.value)
    assert str(file) in raised.value.where
    assert said in raised.value.given


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="directory"):
        read_recipe(tmp_path)


@pytest.mark.parametrize(
    ("settings", "unknown", "meant"),
    [
        ({"fitt": {}}, "'fitt'", "fit"),
        ({"fit": {"epoch": 3}}, "'fit.epoch'", "fit.epochs"),
        ({"fit.epoch": 3}, "'fit.epoch'", "fit.epochs"),
        ({3: 4}, "'3'", ""),
        ({"option": "x"}, "'option'", ""),
    ],
)
def test_an_unknown_name_is_answered_with_the_one_that_is_meant(
    tmp_path: Path, settings: dict[Any, Any], unknown: str, meant: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        check_names(BlockAPJob, settings, tmp_path / "r.yaml")
    assert unknown in raised.value.given
    assert f"did you mean {meant}?" in raised.value.do if meant else raised.value.do == "choose one of these"


def test_names_in_a_recipe_that_a_recipe_names_are_checked(tmp_path: Path) -> None:
    written(tmp_path, b"learning_speed: 3\n")
    with pytest.raises(ConfigError) as raised:
        check_names(LadderJob, {"e2e_qp": "recipe.yaml"}, tmp_path / "other.yaml")
    assert str(tmp_path / "recipe.yaml") in raised.value.where
    assert "learning_speed" in raised.value.given
