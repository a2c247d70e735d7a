"""Samples of several processes are told apart alike in all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from eqat_mm.blocks.calls import BlockCall
from eqat_mm.blocks.parts import _told

ROOT = Path(__file__).parents[2]
SHAPES = [torch.Size((1, 4, 8))] * 3


class Table:
    """An object that blocks are given, compared by identity."""


def calls() -> list[BlockCall]:
    """Three calls: two of a sort, one that is given another table."""
    shared, table, other = torch.arange(6.0).view(2, 3), Table(), Table()
    return [
        BlockCall((), {"mask": None, "gain": shared, "flag": True, "table": held}, 1) for held in (table, table, other)
    ]


def test_sorts_mean_the_same_in_every_process() -> None:
    program = "from tests.blocks.test_parts import SHAPES, _told, calls; print([told.hex() for told in _told(calls(), SHAPES)])"
    other = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT, timeout=120
    )
    here = _told(calls(), SHAPES)
    assert here[0] == here[1] != here[2]
    assert other.stdout.strip() == str([told.hex() for told in here if isinstance(told, bytes)])


def test_tensors_count_by_their_contents() -> None:
    left, right = (_told([BlockCall((), {"gain": torch.full((2, 3), value)}, 1)], SHAPES[:1]) for value in (1.0, 2.0))
    again = _told([BlockCall((), {"gain": torch.ones(2, 3)}, 1)], SHAPES[:1])
    assert left == again != right
