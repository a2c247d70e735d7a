"""Samples of several processes are told apart alike in all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from eqat_mm.blocks.calls import BlockCall
from eqat_mm.blocks.parts import _told

ROOT = Path(__file__).parents[2]
SHAPES = [torch.Size((1, 4, 8))] * 3


def told_of(calls: list[BlockCall]) -> list[Any]:
    """Signatures, as they go to other processes."""
    return _told(calls, SHAPES[: len(calls)])


class Table:
    """An object that blocks are given, compared by identity."""


def calls() -> list[BlockCall]:
    """Three calls: two of a sort, one that is given another table."""
    shared, table, other = torch.arange(6.0).view(2, 3), Table(), Table()
    return [
        BlockCall((), {"mask": None, "gain": shared, "flag": True, "table": held}, 1) for held in (table, table, other)
    ]


def test_sorts_mean_the_same_in_every_process() -> None:
    program = "from tests.blocks.test_parts import *\nprint([told.hex() for told in told_of(calls())])"
    other = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT, timeout=120
    )
    here = told_of(calls())
    assert here[0] == here[1] != here[2]
    assert other.stdout.strip() == str([told.hex() for told in here])


def test_tensors_count_by_their_contents() -> None:
    left, right = (told_of([BlockCall((), {"gain": torch.full((2, 3), value)}, 1)]) for value in (1.0, 2.0))
    again = told_of([BlockCall((), {"gain": torch.ones(2, 3)}, 1)])
    assert left == again != right
