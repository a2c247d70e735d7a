"""Every command of the day of docs/llava.md, on stand-ins."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.day.document import DOCUMENT, ROOT, practitioner_day

RECORDS, IMAGES, STEPS = 120, 60, 8
LAUNCHED = ("deepspeed", "torchrun")


def words(path: Path) -> str:
    """A text of English words: the documentation."""
    documents = (file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md")))
    path.write_text("\n\n\n".join(documents).replace("<", ""), encoding="utf-8")
    return str(path)


def test_the_day_has_its_commands() -> None:
    day = practitioner_day()
    commands = [command for command in day.commands_of_the_day(DOCUMENT.read_text(encoding="utf-8"))]
    run = [command for command in commands if not command.startswith(day.DOWNLOADS)]
    assert [day.short(command) for command in run] == [
        "`eqat plan`",
        "`eqat prepare-data`",
        "`eqat block-ap`",
        "`eqat eval`",
        "`deepspeed e2e-qp`",
        "`tail -n 3 runs/llava-1.5-7b-w2g64/e2e-qp/metrics.jsonl`",
        "`torchrun eval`",
        "`eqat generate`",
        "`eqat chat`",
        "`eqat verify`",
    ]


def test_every_replacement_is_of_something_that_is_there() -> None:
    day = practitioner_day()
    commands = day.commands_of_the_day(DOCUMENT.read_text(encoding="utf-8"))
    for pattern, _ in day.REPLACED:
        assert any(day.re.search(pattern, command) for command in commands), pattern


@pytest.mark.slow
def test_every_command_of_the_day_works(tmp_path: Path) -> None:
    day = practitioner_day()
    place = day.Place(tmp_path / "day", RECORDS, IMAGES, STEPS, words(tmp_path / "words.txt"))
    for cost in day.documented(place):
        assert cost.status == 0, cost.log.read_text(encoding="utf-8")[-4000:]
