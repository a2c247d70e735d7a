"""Of several processes one talks; libraries say only what concerns the user."""

from __future__ import annotations

import logging
import os
import warnings

import pytest

from eqat_mm import cli
from eqat_mm.runtime import quiet
from eqat_mm.runtime.quiet import quiet_libraries


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What a test does to environment and loggers is undone."""
    for name in quiet._LIBRARIES:
        monkeypatch.setattr(logging.getLogger(name), "filters", [])
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def said(level: int, message: str) -> bool:
    record = logging.LogRecord("accelerate.accelerator", level, "", 0, message, (), None)
    return bool(logging.getLogger("accelerate.accelerator").filter(record))


def test_libraries_warn_in_the_first_process(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RANK", "0")
    quiet_libraries()
    assert said(logging.WARNING, "the disk is slow")
    assert said(logging.ERROR, "the disk is full")
    assert not said(logging.WARNING, "Gradient accumulation steps mismatch: GradientAccumulationPlugin has 1")
    assert "TRANSFORMERS_VERBOSITY" not in os.environ


def test_the_others_say_errors_alone_and_show_no_bars(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RANK", "1")
    quiet_libraries()
    quiet_libraries()
    assert len(logging.getLogger("DeepSpeed").filters) == 1
    assert not said(logging.WARNING, "the disk is slow")
    assert said(logging.ERROR, "the disk is full")
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"


@pytest.mark.parametrize(
    ("rank", "category", "expected"),
    [
        ("0", UserWarning, "UserWarning: look\n"),
        ("1", UserWarning, ""),
        ("0", FutureWarning, ""),
    ],
)
def test_warnings_are_for_the_user_and_said_once(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: str,
    category: type[Warning],
    expected: str,
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(warnings, "showwarning", cli._show_warning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", cli._show_warning)
        warnings.warn("look", category, stacklevel=1)
    assert capsys.readouterr().err == expected
