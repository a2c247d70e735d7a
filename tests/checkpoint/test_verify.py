"""The manifest names every file that decides what the model computes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from eqat_mm.blocks.source import INDEX
from eqat_mm.checkpoint import read_manifest, verify_checkpoint
from eqat_mm.errors import CheckpointError
from tests.checkpoint.files import alter_manifest, assert_four_lines, reseal

DECIDES = ("config.json", INDEX, "generation_config.json", "model-00001-of-00003.safetensors")
LATER = ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "additional_chat_templates/tools.jinja")


def refused(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(folder)
    assert_four_lines(caught.value)
    return caught.value


@pytest.mark.parametrize("name", DECIDES)
def test_a_file_that_was_altered(folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.write(b" ")
    assert refused(folder).where == str(folder / name)


@pytest.mark.parametrize("name", DECIDES)
def test_a_file_that_the_manifest_lost(folder: Path, name: str) -> None:
    files = read_manifest(folder).files
    alter_manifest(folder, files={other: digest for other, digest in files.items() if other != name})
    assert name in refused(folder).given


def test_a_manifest_without_files(folder: Path) -> None:
    alter_manifest(folder, files={})
    assert "no SHA-256" in refused(folder).given


@pytest.mark.parametrize("name", LATER)
def test_a_file_that_was_put_there_later(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    assert name in refused(folder).given


def test_a_single_file_of_weights_beside_the_index(folder: Path) -> None:
    """transformers would read it, the index counts here: two answers to one question."""
    shutil.copyfile(folder / "model-00001-of-00003.safetensors", folder / "model.safetensors")
    assert "model.safetensors beside it" in refused(folder).given


def test_other_files_may_lie_beside(folder: Path) -> None:
    for name in ("README.md", ".gitattributes", "notes.txt"):
        (folder / name).write_text("mine")
    assert verify_checkpoint(folder).arch == "llama"


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '""', "{", "[" * 100_000, '{"weight_map": [1]}', '{"weight_map": {"a": null}}'),
        *('{"weight_map": {"a": 3}}', '{"weight_map": {"a": {}}}', '{"weight_map": {"a": "../../x"}}'),
        '{"weight_map": {"a": "/dev/zero"}}',
    ],
)
def test_a_broken_index(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    reseal(folder)
    assert INDEX in refused(folder).where


def test_a_pipe_in_place_of_a_file(folder: Path) -> None:
    import os

    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert refused(folder).given == "no such file"
