"""The manifest notices when it was altered, and is read in every version that there was."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from eqat_mm.checkpoint.manifest import MANIFEST, read_manifest
from eqat_mm.checkpoint.verify import verify_checkpoint
from eqat_mm.errors import CheckpointError
from eqat_mm.runtime.files import read_json, write_json
from tests.checkpoint.files import alter_manifest, assert_four_lines, of_version_1, of_version_2, shard_of


def refused(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_manifest(folder)
    assert_four_lines(caught.value)
    assert caught.value.where == str(folder / MANIFEST)
    return caught.value


# ---- altered ----------------------------------------------------------------------------------------


def test_every_flipped_bit_is_noticed_or_decides_nothing(folder: Path) -> None:
    data, wanted, noticed = (folder / MANIFEST).read_bytes(), read_manifest(folder), 0
    draw = random.Random(0)
    for _ in range(300):
        altered = bytearray(data)
        altered[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (folder / MANIFEST).write_bytes(altered)
        try:
            assert read_manifest(folder) == wanted, bytes(altered)
        except CheckpointError:
            noticed += 1
    assert noticed > 250


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "e2e-qp"},
        {"source": "another"},
        {"provenance": [{"command": "rtn", "seed": 1}]},
        {"format_version": 2},
        {"format_version": 1},
        {"sha256": "0" * 64},
        {"sha256": None},
        {"new_field": 1},
    ],
    ids=str,
)
def test_a_field_that_somebody_edited(folder: Path, change: dict[str, Any]) -> None:
    write_json(folder / MANIFEST, read_json(folder / MANIFEST) | change)
    assert refused(folder).given == "other content than was written"


def test_a_manifest_whose_hash_was_taken_away(folder: Path) -> None:
    write_json(folder / MANIFEST, of_version_2(folder) | {"format_version": 3})
    assert "no sha256" in refused(folder).given


# ---- unreadable -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"arch": "llama"}', "[" * 100_000, '"x"', "null", "1" * 5000])
def test_an_unreadable_manifest(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    assert "unreadable manifest" in refused(folder).given


def test_a_manifest_that_is_no_text(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"\xff\xfe\x00")
    assert "unreadable manifest" in refused(folder).given


def test_a_manifest_that_is_nested_deep(folder: Path) -> None:
    for depth in range(100, 2000, 50):
        (folder / MANIFEST).write_text('{"sha256": "0", "x": ' + "[" * depth + "]" * depth + "}")
        refused(folder)


@pytest.mark.parametrize("change", [{"format_version": 4}, {"new_field": 1}])
def test_a_manifest_of_a_newer_version(folder: Path, change: dict[str, int]) -> None:
    alter_manifest(folder, **change)
    assert "newer version" in refused(folder).do


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"x": 3}},
        {"files": "x"},
        {"files": {"../../x": "0" * 64}},
        {"files": {"/etc/passwd": "0" * 64}},
        {"files": {"model.safetensors": "short"}},
        {"spec": {}},
        {"spec": {"bits": None, "group_size": 32}},
        {"spec": {"bits": 3, "group_size": 32, "colour": 1}},
        {"spec": {"bits": 3.0, "group_size": 32}},
        {"spec": {"bits": 5, "group_size": 32}},
        {"provenance": []},
        {"provenance": [3]},
        {"activation_bits": 5},
        {"kv_cache_bits": True},
        {"auto_class": "AutoTokenizer"},
        {"arch": 7},
    ],
    ids=str,
)
def test_a_manifest_that_cannot_be(folder: Path, change: dict[str, Any]) -> None:
    alter_manifest(folder, **change)
    assert "unreadable manifest" in refused(folder).given


# ---- older versions ---------------------------------------------------------------------------------


def test_a_manifest_without_a_hash_of_its_own_is_read_and_that_is_said(folder: Path) -> None:
    wanted = read_manifest(folder)
    write_json(folder / MANIFEST, of_version_2(folder))
    with pytest.warns(UserWarning, match="eqat.json is of version 2: eqat.json cannot be checked"):
        found = verify_checkpoint(folder)
    assert found.renewed() == wanted


def test_a_manifest_that_lists_weights_alone_is_read_and_that_is_said(folder: Path) -> None:
    write_json(folder / MANIFEST, of_version_1(folder))
    (folder / "generation_config.json").write_text("{}")
    with pytest.warns(UserWarning, match="version 1: eqat.json and files other than weights cannot be checked"):
        verify_checkpoint(folder)
    shard_of(folder, "lm_head.weight").write_bytes(b"")
    with pytest.raises(CheckpointError, match="sha256"):
        verify_checkpoint(folder)
