"""What the console says."""

from __future__ import annotations

import pytest

from eqat_mm.runtime.progress import complain, duration, progress, say


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.4, "0s"),
        (42, "42s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (187, "3m07s"),
        (3599.6, "1h00m"),
        (7500, "2h05m"),
        (100 * 3600, "100h00m"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_line_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    say("one line")
    assert capsys.readouterr().out == "one line\n"


def test_progress_yields_every_item_and_writes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), what="numbers", unit="number")) == [0, 1, 2]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "numbers" in captured.err


def test_no_bar_comes_after_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = progress(range(3), what="numbers", unit="number")
    next(numbers)
    complain("the end")
    assert capsys.readouterr().err.endswith("the end\n")
    numbers.close()
    assert capsys.readouterr().err == ""
