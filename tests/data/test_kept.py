"""The samples that a run began with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eqat_mm.data.kept import SAMPLES, Kept
from eqat_mm.errors import CheckpointError
from tests.checkpoint.files import assert_four_lines

KEPT = Kept(np.array([5, -3, 8]), np.array([10, 20, 30], dtype=np.int32), np.array([True, False, False]))


def test_what_is_saved_is_opened(tmp_path: Path) -> None:
    KEPT.save(tmp_path)
    opened = Kept.open(tmp_path)
    assert opened is not None
    for name, value in vars(KEPT).items():
        assert np.array_equal(getattr(opened, name), value)
        assert getattr(opened, name).dtype == value.dtype


def test_a_run_folder_without_them_is_none(tmp_path: Path) -> None:
    assert Kept.open(tmp_path) is None


@pytest.mark.parametrize("place", [0, 8, -1])
def test_a_damaged_file_is_named(tmp_path: Path, place: int) -> None:
    KEPT.save(tmp_path)
    content = bytearray((tmp_path / SAMPLES).read_bytes())
    for damaged in (content[: len(content) // 2], b"", b"\0" * len(content), _flipped(content, place)):
        (tmp_path / SAMPLES).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=SAMPLES) as raised:
            Kept.open(tmp_path)
        assert_four_lines(raised.value)


def _flipped(content: bytearray, place: int) -> bytes:
    return bytes(content[:place]) + bytes([content[place] ^ 1]) + (content[place + 1 :] if place != -1 else b"")
