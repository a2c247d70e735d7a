"""Errors of the system become ours, also where a library tells of them in its own words."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from eqat_mm.errors import explained_system_error
from tests.checkpoint.files import assert_four_lines


def test_a_full_disk_in_the_words_of_each_library() -> None:
    def with_python() -> None:
        Path("/dev/full").write_text("words")

    def with_numpy() -> None:
        np.zeros(10**6).tofile("/dev/full")

    def with_torch() -> None:
        torch.save(torch.zeros(10**6), "/dev/full")

    for write in (with_python, with_numpy, with_torch):
        with pytest.raises((OSError, RuntimeError)) as raised:
            write()
        explained = explained_system_error(raised.value)
        assert explained is not None, raised.value
        assert_four_lines(explained)
        assert "free disk space" in explained.do


def test_a_missing_folder_in_the_words_of_safetensors(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="os error 2") as raised:
        save_file({"a": torch.zeros(1)}, tmp_path / "nowhere" / "a.safetensors")
    explained = explained_system_error(raised.value)
    assert explained is not None
    assert explained.do == "check the path"


def test_a_circular_link(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((OSError, RuntimeError)) as raised:
        (tmp_path / "loop").resolve(strict=True)
    explained = explained_system_error(raised.value)
    assert explained is not None
    assert explained.do == "name another path"


def test_what_only_our_code_can_cause_stays_as_it_is() -> None:
    assert explained_system_error(RuntimeError("shapes do not match")) is None
    assert explained_system_error(OSError(errno.EBADF, os.strerror(errno.EBADF))) is None
