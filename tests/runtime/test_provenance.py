"""Every result says what made it."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
import torch

from eqat_mm.runtime import provenance as module
from eqat_mm.runtime.memory import peak_bytes
from eqat_mm.runtime.provenance import provenance


def test_the_record_is_complete_json() -> None:
    record = provenance("eqat block-ap", {"quant": {"bits": 2}}, seed=5)
    assert json.loads(json.dumps(record)) == record
    assert (record["command"], record["config"], record["seed"]) == ("eqat block-ap", {"quant": {"bits": 2}}, 5)
    assert torch.__version__.startswith(record["versions"]["torch"].partition("+")[0])
    assert datetime.fromisoformat(record["started"]).tzinfo is not None


def test_what_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PACKAGES", ("torch", "no-such-distribution"))
    assert provenance("x", {}, 0)["versions"]["no-such-distribution"] is None


def test_outside_a_checkout_there_is_no_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "__file__", str(tmp_path / "a" / "b" / "provenance.py"))
    assert provenance("x", {}, 0)["revision"] is None


def test_peak_memory_is_that_of_this_process() -> None:
    assert 2**26 < peak_bytes(torch.device("cpu")) < 2**40
