"""Names that other packages register."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from eqat_mm.errors import ConfigError
from eqat_mm.runtime import plugins
from eqat_mm.runtime.plugins import MODELS, plugged, plugged_folders, plugged_function
from tests.checkpoint.files import assert_four_lines


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    plugged.cache_clear()
    plugged_folders.cache_clear()
    yield
    plugged.cache_clear()
    plugged_folders.cache_clear()


def register(monkeypatch: pytest.MonkeyPatch, **named: str) -> None:
    """Pretend that another distribution registers these values in every group."""
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: [EntryPoint(name, value, group) for name, value in named.items()]
    )


def test_the_demo_is_found() -> None:
    assert set(plugged(MODELS)) >= {"smollm2-135m", "demo-llava"}
    assert {path.name for folder in plugged_folders("recipes") for path in folder.iterdir()} >= {
        "smollm2-135m.yaml",
        "demo-llava.yaml",
    }
    assert any((folder / "easy_vqa").is_dir() for folder in plugged_folders("tasks"))


def test_a_name_gives_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, here="pathlib:Path.cwd")
    assert plugged_function(MODELS, "here")() == Path.cwd()


@pytest.mark.parametrize("value", ["no_such_module:function", "pathlib:no_such_function"])
def test_what_cannot_be_imported_is_named_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    register(monkeypatch, broken=value)
    assert set(plugged(MODELS)) == {"broken"}
    with pytest.raises(ConfigError, match=value) as raised:
        plugged_function(MODELS, "broken")
    assert_four_lines(raised.value)


def test_of_two_with_one_name_the_first_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entries = [EntryPoint("name", value, MODELS) for value in ("pathlib:Path.cwd", "pathlib:Path.home")]
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries)
    with caplog.at_level(logging.WARNING):
        assert plugged_function(MODELS, "name")() == Path.cwd()
    assert "its name is taken" in caplog.text


def test_a_package_without_the_folder_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, first="no_such_package", second="json")
    assert plugged_folders("recipes") == ()
