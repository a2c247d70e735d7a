"""Numbers on a dashboard, with modules of the names of the optional packages in their place."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

from eqat_mm.errors import ConfigError
from eqat_mm.runtime import reporting
from eqat_mm.runtime.reporting import SILENT, reporter, require_reporter
from tests.checkpoint.files import assert_four_lines

NUMBERS = {"step": 3, "loss": 1.5, "grad_norm": None, "name": "block 3", "kl": float("nan"), "tokens": 7}


class Writer:
    """Stands in for a `SummaryWriter`."""

    made: ClassVar[list[Writer]] = []

    def __init__(self, folder: str) -> None:
        self.folder, self.scalars, self.closed = folder, [], False  # type: ignore[var-annotated]
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_named(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=f"pip install {kind}") as raised:
        require_reporter(kind)
    assert_four_lines(raised.value)
    require_reporter("none")


def test_tensorboard_gets_finite_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    found = reporter("tensorboard", tmp_path, {})
    found.add(3, NUMBERS)
    found.close()
    (writer,) = Writer.made
    assert writer.folder == str(tmp_path / "tensorboard")
    assert writer.scalars == [("loss", 1.5, 3), ("tokens", 7.0, 3)]
    assert writer.closed


def test_wandb_gets_the_same_and_a_continued_run_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, float], int]] = []

    class Run:
        def log(self, numbers: dict[str, float], step: int) -> None:
            logged.append((numbers, step))

        def finish(self) -> None:
            logged.append(({}, -1))

    def init(**given: Any) -> Run:
        begun.append(given)
        return Run()

    module: Any = ModuleType("wandb")
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    for _ in range(2):
        found = reporter("wandb", tmp_path, {"learning_rate": 1e-3})
    reporter("wandb", tmp_path / "other", {})
    found.add(3, NUMBERS)
    found.close()
    assert logged == [({"loss": 1.5, "tokens": 7.0}, 3), ({}, -1)]
    assert begun[0] == begun[1]
    assert begun[0]["id"] != begun[2]["id"]
    assert begun[0]["resume"] == "allow"
    assert begun[0]["config"] == {"learning_rate": 1e-3}


def test_only_the_first_process_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert reporter("wandb", tmp_path, {}) is SILENT
    monkeypatch.setenv("RANK", "0")
    assert reporter("none", tmp_path, {}) is SILENT
