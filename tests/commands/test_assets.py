"""`eqat assets`: short names, those of other packages among them."""

from __future__ import annotations

import pytest

from eqat_mm.commands.verbs.assets import AssetsJob, assets
from eqat_mm.errors import ConfigError
from llava_adapters.aliases import ALIASES
from tests.checkpoint.files import assert_four_lines


def test_all_names_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assets(AssetsJob())
    said = capsys.readouterr().out
    assert all(name in said for name in ("smollm2-135m", "demo-llava", "demo-wikipedia", "demo-easy-vqa", *ALIASES))
    assert "10,033 articles of English Wikipedia" in said


def test_what_a_name_stands_for_is_fetched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("eqat_demo.wikipedia.wikipedia", lambda: ["one", "two"])
    monkeypatch.setattr("eqat_demo.smollm2.smollm2_folder", lambda: "/a/folder")
    assets(AssetsJob(("demo-wikipedia", "smollm2-135m")))
    assert capsys.readouterr().out.splitlines() == ["demo-wikipedia: 2 documents", "smollm2-135m: /a/folder"]


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose one") as raised:
        assets(AssetsJob(("llama-2-7b",)))
    assert_four_lines(raised.value)
    assert {"demo-llava", "smollm2-135m", "demo-wikipedia", "demo-easy-vqa"} <= set(raised.value.allowed.split(", "))
