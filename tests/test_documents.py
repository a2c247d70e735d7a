"""What the documents say: every command is one that is taken, every recipe one that there is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from eqat_mm.cli import main, parse_job
from eqat_mm.commands.line.recipes import named_recipe

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.M | re.S)
SCRIPT = re.compile(r"scripts/(block_ap|e2e_qp|llm_qat|generate_data|eval)\.py ")
MODULE = re.compile(r"(?:-m|--module) eqat_mm (.*)")
NAME = re.compile(
    r"`((?:demo-llava|llama-2|llava-1\.5|llava-next|smollm2-135m)-[\w.-]*-(?:block-ap|[\w-]*e2e-qp|[\w-]*demo))`"
)


def commands_in(text: str) -> Iterator[list[str]]:
    """The commands of eqat in fenced blocks, as words after `eqat`, those of launchers among them."""
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip()
            if (script := SCRIPT.search(f"{line} ")) is not None:
                words = shlex.split(line[script.end() :], comments=True)
                yield [script[1].replace("_", "-"), *words]
            elif (module := MODULE.search(line)) is not None:
                yield shlex.split(module[1], comments=True)
            elif (found := re.match(r"(?:\$ )?(?:\.venv/bin/)?eqat (.*)", line)) is not None:
                yield shlex.split(found[1], comments=True)


COMMANDS_IN = [
    pytest.param(words, id=f"{path.name}: {' '.join(words)}"[:90])
    for path in DOCUMENTS
    for words in commands_in(path.read_text(encoding="utf-8"))
    if "..." not in words
]


def test_there_are_commands_in_the_documents() -> None:
    assert len(COMMANDS_IN) > 40


@pytest.mark.parametrize("words", COMMANDS_IN)
def test_a_documented_command_is_taken(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("fit: {epochs: 4}\nmodel: m\n", encoding="utf-8")
    command, *rest = words
    if command == "recipes":
        assert main(words) == 0
    elif "--help" in rest:
        with pytest.raises(SystemExit):
            main(words)
    else:
        parse_job(command, rest)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_recipe_in_a_document_is_there(path: Path) -> None:
    names = NAME.findall(path.read_text(encoding="utf-8"))
    assert [name for name in names if named_recipe(name) is None] == []
