"""Stopped equals whole: every adapter, everything that can be trained, one process and two, whoever stopped it.

A launcher is started once for all cases. What it takes ten seconds for, one process does in between.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llava_adapters.registry import known_archs
from tests.commands.launching import DATA_PARALLEL, ROOT, environment
from tests.tolerances import TOLERANCES
from tests.train.cases import cases_in
from tests.train.contract import STEPS, Contract

pytest.importorskip("deepspeed")

KINDS = ("plain", "zero-1", "zero-2", "zero-3")
SOME = (
    "llama:scales:zero-2",
    "llava:scales+projector:zero-3",
    "llava_next:lora:zero-1",
    "llava:llm-qat:plain",
    "llava:llm-qat:zero-3",
)
"""Every kind, and every thing to train."""


def every() -> list[str]:
    """All cases."""
    return [
        f"{arch.name}:{trains}:{kind}"
        for arch in known_archs().values()
        for trains in ("scales", "lora", "llm-qat", *(("projector",) if arch.projector else ()))
        for kind in KINDS
    ]


def play(folder: Path, names: tuple[str, ...] | list[str]) -> list[Contract]:
    """Play cases in one process, in two, and in one again, which goes on with what two have stopped."""
    contracts = [Contract.of(folder, name) for name in names]
    for contract in contracts:
        cases_in(folder / "models", contract.family, contract.trains)
        contract.play()
    script = str(Path(__file__).with_name("contract.py"))
    done = subprocess.run(
        [*DATA_PARALLEL, script, str(folder), *names],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    for contract in contracts:
        contract.copy(contract.place(2) / "stopped", contract.place(1) / "runs" / "continued")
        contract.train(contract.place(1) / "runs" / "continued", "continued")
    return contracts


def check(contract: Contract) -> None:
    """Assert that no run of a case differs from the whole one; where processes are as many, in no bit."""
    alone = contract.result(1, "whole")
    assert len(alone["losses"]) == STEPS
    for world in (1, 2):
        whole, again = contract.result(world, "whole"), contract.result(world, "again")
        assert again["losses"] == whole["losses"]
        assert all(torch.equal(again["weights"][name], value) for name, value in whole["weights"].items())
        for found in (whole, contract.result(world, "continued")):
            assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4)
            for name, value in alone["weights"].items():
                assert_all_but_close(found["weights"][name], value)


def assert_all_but_close(found: Tensor, expected: Tensor) -> None:
    """As close as models are, but for one number in a hundred: Adam makes a whole step of the sign of a last bit."""
    difference = (found - expected).abs() / expected.abs().max()
    assert (difference > TOLERANCES["model"][torch.float32]).float().mean() < 0.01
    assert difference.max() < 0.05


def test_stopped_equals_whole(tmp_path: Path) -> None:
    for contract in play(tmp_path, SOME):
        check(contract)


@pytest.mark.slow
def test_stopped_equals_whole_in_every_case(tmp_path: Path) -> None:
    differing = {}
    for contract in play(tmp_path, every()):
        try:
            check(contract)
        except AssertionError as error:
            differing[contract.name] = str(error)
    assert not differing
