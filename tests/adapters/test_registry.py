"""Names of models and architectures: what they stand for, and what is said of unknown ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eqat_mm.errors import AdapterError, CheckpointError
from eqat_mm.runtime.files import write_json
from llava_adapters import arch_for, arch_of_folder, known_archs, llama, registry, resolve_alias


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    known_archs.cache_clear()
    yield
    known_archs.cache_clear()


def register(monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    """Pretend that another distribution registers `found`."""
    dist = SimpleNamespace(name="outside-package")
    entry = SimpleNamespace(value="outside.module:ADAPTER", dist=dist, load=lambda: found)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == "eqat_mm.adapters" else [])


def test_an_alias_is_expanded() -> None:
    assert resolve_alias("llama-2-7b") == "meta-llama/Llama-2-7b-hf"


def test_a_name_of_another_package_is_left_as_it_is() -> None:
    assert resolve_alias("smollm2-135m") == "smollm2-135m"


def test_an_existing_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_alias(str(tmp_path)) == str(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mistral-7b").mkdir()
    assert resolve_alias("mistral-7b") == "mistral-7b"


def test_a_hub_repository_is_left_as_it_is() -> None:
    assert resolve_alias("owner/Some-Model") == "owner/Some-Model"


@pytest.mark.parametrize("name", ["lama-2-7b", "./llama-2-7b", "/llama-2-7b", "~/llama-2-7b"])
def test_an_unknown_model_lists_near_names(name: str) -> None:
    with pytest.raises(AdapterError) as caught:
        resolve_alias(name)
    assert caught.value.where == "--model"
    assert caught.value.given == repr(name)
    assert "llama-2-7b" in caught.value.allowed
    assert "vicuna" not in caught.value.allowed


def test_a_name_near_nothing_lists_all() -> None:
    with pytest.raises(AdapterError) as caught:
        resolve_alias("@@@")
    assert all(alias in caught.value.allowed for alias in registry.ALIASES)


def test_an_unknown_adapter_lists_the_known() -> None:
    assert arch_for("llama") is llama.ARCH
    with pytest.raises(AdapterError) as caught:
        arch_for("lama")
    assert all(name in caught.value.allowed for name in known_archs())


def test_an_architecture_is_found_by_model_type(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "mistral"})
    assert arch_of_folder(tmp_path).name == "mistral"
    assert arch_of_folder(tmp_path, adapter="llama").name == "llama"


@pytest.mark.parametrize("config", [{"model_type": "gpt2"}, {"model_type": "nobody-knows"}, {}])
def test_a_model_type_without_adapter(tmp_path: Path, config: dict[str, str]) -> None:
    write_json(tmp_path / "config.json", config)
    with pytest.raises(AdapterError) as caught:
        arch_of_folder(tmp_path)
    assert caught.value.given == repr(config.get("model_type"))
    assert "llama" in caught.value.allowed
    assert "adding_a_model" in caught.value.do


@pytest.mark.parametrize("adapter", [None, "llama"])
def test_a_folder_that_is_no_model(tmp_path: Path, adapter: str | None) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        arch_of_folder(tmp_path, adapter)


def test_other_distributions_register_adapters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    outside = replace(llama.ARCH, name="outside", model_types=("outside_type",))
    register(monkeypatch, outside)
    assert arch_for("outside") is outside
    assert {"llama", "mistral"} < set(known_archs())
    write_json(tmp_path / "config.json", {"model_type": "outside_type"})
    assert arch_of_folder(tmp_path) is outside


def test_an_unknown_adapter_is_told_from_where_it_was_named() -> None:
    for words in ((), ("base/model: the adapter that made it",)):
        with pytest.raises(AdapterError) as caught:
            arch_for("qwen4", *words)
        assert caught.value.where == (words[0] if words else "--adapter")
        assert "install the package that has it" in caught.value.do


@pytest.mark.parametrize(
    ("found", "reason"),
    [({"name": "outside"}, "it is a dict"), (replace(llama.ARCH, model_types=("x",)), "the name 'llama' is taken")],
    ids=["not an Arch", "a name that is taken"],
)
def test_an_adapter_that_cannot_be_used_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, found: Any, reason: str
) -> None:
    register(monkeypatch, found)
    assert known_archs()["llama"] is llama.ARCH
    assert f"outside.module:ADAPTER of the package outside-package is not used: {reason}" in caplog.text


def test_a_package_that_cannot_be_imported_stops_nobody_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entry = EntryPoint("broken", "not_installed_anywhere:ADAPTER", "eqat_mm.adapters")
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    assert arch_for("mistral").name == "mistral"
    assert "ModuleNotFoundError: No module named 'not_installed_anywhere'" in caplog.text
