"""Numbers on a dashboard. Modules of the names of the optional packages stand in for these."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from eqat_mm.errors import ConfigError
from eqat_mm.runtime import reporting
from eqat_mm.runtime.reporting import SILENT, reported, require_reporter
from tests.checkpoint.files import assert_four_lines

NUMBERS = {"step": 3, "loss": 1.5, "grad_norm": None, "name": "block 3", "kl": float("nan"), "tokens": 7}


@dataclass
class Writer:
    """Stands in for a `SummaryWriter`."""

    log_dir: str
    purge_step: int
    scalars: list[tuple[str, float, int]] = field(default_factory=list)
    closed: bool = False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class WandBError(Exception):
    """Stands in for `wandb.Error`."""


@dataclass
class WandB:
    """Stands in for the module `wandb` and for its run, which begins behind what the server has of it."""

    step: int = 0
    refuses: str = ""
    begun: list[dict[str, Any]] = field(default_factory=list)
    logged: list[tuple[dict[str, float], int]] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)

    def login(self) -> None:
        if self.refuses == "login":
            raise WandBError("No API key configured.\nUse `wandb login` to log in.")

    def init(self, **given: Any) -> WandB:
        if self.refuses == "init":
            raise WandBError("Run initialization has timed out")
        self.begun.append(given)
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.step = step
        self.logged.append((numbers, step))

    def finish(self, exit_code: int) -> None:
        self.ended.append(exit_code)


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[Writer]:
    """All writers that are made."""
    made: list[Writer] = []
    module: Any = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda *args, **kwargs: made.append(Writer(*args, **kwargs)) or made[-1]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return made


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> WandB:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    found = WandB()
    module: Any = ModuleType("wandb")
    module.login, module.init, module.Error = found.login, found.init, WandBError
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(reporting, "find_spec", lambda name: ModuleSpec(name))
    return found


@dataclass
class ModuleSpec:
    """Of a package that is installed."""

    name: str
    origin: str | None = "there"


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_named(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=f"pip install {kind}") as raised:
        require_reporter(kind)
    assert_four_lines(raised.value)
    require_reporter("none")


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_folder_of_its_name_is_no_package(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / kind).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setitem(sys.modules, kind, None)
    monkeypatch.delitem(sys.modules, kind)
    with pytest.raises(ConfigError, match="is not installed"):
        require_reporter(kind)


def test_tensorboard_gets_finite_numbers(tmp_path: Path, writers: list[Writer]) -> None:
    with reported("tensorboard", tmp_path, {}) as found:
        found.begin(-1)
        found.add(3, NUMBERS)
    (writer,) = writers
    assert writer.log_dir == str(tmp_path / "tensorboard")
    assert writer.scalars == [("loss", 1.5, 3), ("tokens", 7.0, 3)]
    assert writer.closed


def test_steps_that_come_again_replace_those_of_before_in_tensorboard(tmp_path: Path, writers: list[Writer]) -> None:
    for behind in (-1, 0, 40):
        with reported("tensorboard", tmp_path, {}) as found:
            found.begin(behind)
    assert [writer.purge_step for writer in writers] == [0, 1, 41]
    with reported("tensorboard", tmp_path, {}):  # a run that was only to be stored
        assert len(writers) == 3


def test_wandb_gets_the_same_and_a_continued_run_is_the_same_run(tmp_path: Path, wandb: WandB) -> None:
    for folder in (tmp_path, tmp_path, tmp_path / "other"):
        with reported("wandb", folder, {"learning_rate": 1e-3}) as found:
            found.begin(2)
            found.add(3, NUMBERS)
    assert wandb.logged == [({"loss": 1.5, "tokens": 7.0}, 3)] * 3
    first, second, other = wandb.begun
    assert first == second
    assert first["id"] != other["id"]
    assert (first["resume"], first["config"]) == ("allow", {"learning_rate": 1e-3})
    assert wandb.ended == [0, 0, 0]


def test_wandb_is_not_told_twice_of_a_step(tmp_path: Path, wandb: WandB) -> None:
    wandb.step = 3  # until here an earlier start has come
    with reported("wandb", tmp_path, {}) as found:
        for step in (2, 3, 4, 4):
            found.add(step, {"loss": float(step)})
    assert [step for _, step in wandb.logged] == [3, 4, 4]


def test_a_run_that_breaks_is_not_a_finished_one(tmp_path: Path, wandb: WandB, writers: list[Writer]) -> None:
    def broken(kind: Any) -> None:
        with reported(kind, tmp_path, {}) as found:
            found.begin(-1)
            raise KeyboardInterrupt

    for kind in ("wandb", "tensorboard"):
        with pytest.raises(KeyboardInterrupt):
            broken(kind)
    assert wandb.ended == [1]
    assert writers[0].closed


def test_who_is_not_known_to_wandb_is_told_before_anything_is_done(
    wandb: WandB, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_reporter("wandb")
    wandb.refuses = "login"
    with pytest.raises(ConfigError, match="No API key configured") as raised:
        require_reporter("wandb")
    assert_four_lines(raised.value)
    assert "WANDB_MODE=offline" in raised.value.do
    monkeypatch.setenv("WANDB_MODE", "offline")
    require_reporter("wandb")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("RANK", "1")  # the first process asks
    require_reporter("wandb")


def test_a_wandb_that_does_not_answer_is_said(tmp_path: Path, wandb: WandB) -> None:
    wandb.refuses = "init"
    with pytest.raises(ConfigError, match="timed out") as raised, reported("wandb", tmp_path, {}):
        pass
    assert_four_lines(raised.value)


def test_only_the_first_process_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: WandB) -> None:
    monkeypatch.setenv("RANK", "1")
    with reported("wandb", tmp_path, {}) as found:
        assert found is SILENT
    monkeypatch.setenv("RANK", "0")
    with reported("none", tmp_path, {}) as found:
        assert found is SILENT
    assert not wandb.begun
    assert not os.listdir(tmp_path)
