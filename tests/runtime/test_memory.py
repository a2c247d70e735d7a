"""Memory of the process."""

from __future__ import annotations

import ctypes

import pytest
import torch

from eqat_mm.runtime.memory import keep_freed_memory, peak_bytes


def test_the_peak_is_at_least_what_is_held() -> None:
    held = torch.ones(2**25)
    assert peak_bytes(torch.device("cpu")) >= held.nbytes


def test_a_c_library_without_the_switch_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False
