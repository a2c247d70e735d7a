"""Results of Block-AP runs, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from eqat_mm.runtime.files import read_json
from tests.checkpoint.files import tensors_of
from tests.tolerances import assert_close

COUNTS = ("block", "steps", "tokens", "skipped", "retries")
LOSSES = ("loss_before", "loss_after", "relative_error", "validation", "training")


def records_of(folder: Path) -> list[dict[str, Any]]:
    """What was recorded of each block."""
    return list(read_json(folder / "state.json")["records"])


def assert_same_result(folder: Path, other: Path) -> None:
    """The same losses, and the same weights but for a code here and there, which a last bit can tip over."""
    left, right = records_of(folder), records_of(other)
    for name in COUNTS:
        assert [record[name] for record in left] == [record[name] for record in right]
    for name in LOSSES:
        found, expected = (torch.tensor([record[name] for record in records]) for records in (left, right))
        assert_close(found, expected, "model", torch.float32)
    weights, expected_weights = tensors_of(folder / "model"), tensors_of(other / "model")
    assert weights.keys() == expected_weights.keys()
    for name, expected in expected_weights.items():
        if expected.is_floating_point():
            assert_close(weights[name].float(), expected.float(), "model", expected.dtype)
        else:
            assert (weights[name] != expected).float().mean() < 0.01, name
