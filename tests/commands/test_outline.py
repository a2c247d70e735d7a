"""Options as they are kept are those that there are; help and mistakes are answered from them, at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eqat_mm.cli import main, parse_job
from eqat_mm.commands.line import outline as module
from eqat_mm.commands.line.commands import COMMANDS
from eqat_mm.commands.line.help_text import BASIC
from eqat_mm.commands.line.outline import OPTIONS_FILE, options_of, outline, stored_options

PROGRAM = """
import sys
from eqat_mm.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
print("torch" if "torch" in sys.modules else "no torch")
sys.exit(code)
"""


def test_the_kept_options_are_those_of_the_jobs() -> None:
    kinds = {name: command.load()[0] for name, command in COMMANDS.items()}
    assert OPTIONS_FILE.read_text(encoding="utf-8") == outline(kinds), "run `make options`"


@pytest.mark.parametrize("command", COMMANDS)
def test_kept_options_come_back_as_they_were(command: str) -> None:
    assert stored_options(command) == list(options_of(COMMANDS[command].load()[0]))


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"commands": {}}', '{"hash": "x", "sources": ["runtime/settings.py"]}']
)
def test_kept_options_of_other_sources_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    monkeypatch.setattr(module, "OPTIONS_FILE", tmp_path / "options.json")
    (tmp_path / "options.json").write_text(text, encoding="utf-8")
    assert stored_options("rtn") is None
    assert main(["rtn", "m", "--no_such", "1"]) == 2
    assert "unknown option --no_such" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["e2e-qp", "--help"], 0, "--conversations.image_folder"),
        (["block-ap", "llava-1.5-7b", "--help"], 0, "hf:DKYoon/SlimPajama-6B"),
        (["block-ap", "--fit.epoch", "3"], 2, "did you mean --fit.epochs?"),
        (["blok-ap"], 2, "did you mean block-ap?"),
        (["e2e-qp"], 2, "no model"),
        (["recipes"], 0, "llava-1.5"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_and_mistakes_are_answered_without_torch(words: list[str], status: int, said: str) -> None:
    before = os.times()
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False)
    after = os.times()
    assert done.returncode == status
    assert said in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "no torch"
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2


def helped(capsys: pytest.CaptureFixture[str], command: str, *words: str, how: str = "--help-all") -> str:
    with pytest.raises(SystemExit) as ended:
        parse_job(command, [*words, how])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_on_a_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = helped(capsys, command, how="--help").splitlines()
    assert len(lines) <= 60
    assert all(len(line) <= 100 for line in lines if "recipe" not in line)
    assert f"eqat {command} --help-all" in lines[-1]
    rows = [line for line in lines if line.startswith("  --")]
    assert [row for row in rows if "..." not in row and row.count("(") != row.count(")")] == []


def test_every_basic_option_is_one() -> None:
    names = {option.name for command in COMMANDS.values() for option in options_of(command.load()[0])}
    assert sorted(BASIC - names) == []


def test_help_has_what_a_run_on_conversations_names(capsys: pytest.CaptureFixture[str]) -> None:
    said = helped(capsys, "e2e-qp", "llava-1.5-7b", how="--help")
    for name in ("source", "image_folder", "max_length", "template", "images"):
        assert f"  --conversations.{name} " in said
    for name in ("trains", "learning_rate", "batch_size", "global_batch", "deepspeed", "report_to"):
        assert f"  --{name} " in said
    assert "[scales+projector]" in said
    assert "--lr_floor" not in said


def test_help_says_what_an_option_does_takes_and_is(capsys: pytest.CaptureFixture[str]) -> None:
    said = " ".join(helped(capsys, "block-ap").split())
    assert "leaves the block at its initialisation. [an integer of 0 or more; default 2]" in said
    assert "Second-moment decay of AdamW. [a number above 0, below 1; default 0.999]" in said
    assert "--model Model folder, alias (`eqat assets`) or hub repository. [text; required]" in said
    assert "Precision of matrix products;" in said


def test_help_shows_the_settings_of_the_model_that_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    said = " ".join(helped(capsys, "e2e-qp", "llava-1.5-7b", "--quant.bits", "4").split())
    assert "settings: recipe llava-1.5-w4g64-e2e-qp" in said
    assert "[a number above 0; default 2e-05]" in said
    assert "default data/llava_v1_5_mix665k.json" in said
    assert "default kl" not in helped(capsys, "e2e-qp")
    assert "default 1e-05" in helped(capsys, "block-ap", "--config", "llama-2-w3-block-ap")


def test_the_defaults_of_a_group_are_those_it_has_there() -> None:
    found: dict[str, Any] = {option.name: option.default for option in options_of(COMMANDS["eval"].load()[0])}
    assert (found["data.part"], found["data.length"], found["data.count"]) == ("held_out", 512, 64)
    kept = {option.name: option for option in options_of(COMMANDS["e2e-qp"].load()[0])}
    assert kept["conversations"].kind == "settings"
    assert (kept["overwrite"].kind, kept["output"].kind, kept["data.source"].kind) == ("flag", "place", "value")
    assert {option.name: option.kind for option in options_of(COMMANDS["generate"].load()[0])}["image"] == "list"
