"""Text, conversations, or both: what is trained on is what was named, and nothing of it is left out in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eqat_mm.cli import main, parse_job
from eqat_mm.commands.plumbing.end_to_end_job import EndToEndJob
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.files import write_json
from tests.checkpoint.files import assert_four_lines

COMMANDS_OF_BOTH = ("e2e-qp", "llm-qat")
TEXT = ("--data.source", "t.txt")
TALKS = ("--conversations.source", "c.json")
SHARE = ("--text_share", "0.1")
ALONE = ("--text_only",)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a model that sees and of one that does not, as far as this is asked for."""
    folder = tmp_path_factory.mktemp("models")
    configs: dict[str, Any] = {"llava": {"model_type": "llava", "vision_config": {}}, "llama": {"model_type": "llama"}}
    for name, config in configs.items():
        (folder / name).mkdir()
        write_json(folder / name / "config.json", config | {"hidden_size": 64})  # of no family with a recipe
    return {name: str(folder / name) for name in ("llava", "llama")}


def decided(command: str, model: str, *words: str) -> EndToEndJob:
    job: Any = parse_job(command, ["--model", model, *words])
    decided: EndToEndJob = job.with_data_decided(model)
    return decided


@pytest.mark.parametrize("command", COMMANDS_OF_BOTH)
@pytest.mark.parametrize(
    ("words", "talks", "share"),
    [
        (TALKS, True, None),
        ((*TEXT, *TALKS, "--data.source", "null"), True, None),
        ((*TALKS, *TEXT, *SHARE), True, 0.1),
        ((*TEXT, *ALONE), False, None),
        ((*TALKS, *TEXT, *ALONE), False, None),
        ((*TALKS, *TEXT, *SHARE, *ALONE), False, None),
    ],
)
def test_what_is_named_is_what_is_learned_from(
    models: dict[str, str], command: str, words: tuple[str, ...], talks: bool, share: float | None
) -> None:
    for model in ("llava", "llama"):
        job = decided(command, models[model], *words)
        assert ((job.conversations is not None), job.text_share) == (talks, share)


@pytest.mark.parametrize("command", COMMANDS_OF_BOTH)
@pytest.mark.parametrize(
    ("model", "words", "where", "do"),
    [
        ("llava", (), "--conversations.source", "--text_only"),
        ("llava", TEXT, "--conversations.source", "--text_only"),
        ("llava", (*TEXT, *SHARE), "--conversations.source", "--text_only"),
        ("llava", (*TALKS, *TEXT), "--data.source and --conversations.source", "--text_share 0.1"),
        ("llama", (*TALKS, *TEXT), "--data.source and --conversations.source", "--text_share 0.1"),
        ("llama", (*TEXT, *SHARE), "--text_share 0.1", "--conversations.source"),
        ("llama", (*TALKS, *SHARE), "--data.source", "--data.source"),
        ("llava", (*TALKS, *SHARE), "--data.source", "--data.source"),
        ("llava", ALONE, "--data.source", "--data.source"),
        ("llama", (), "--data.source", "--data.source"),
    ],
)
def test_anything_else_is_refused(
    models: dict[str, str], command: str, model: str, words: tuple[str, ...], where: str, do: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        decided(command, models[model], *words)
    assert_four_lines(raised.value)
    assert raised.value.where == where
    assert do in raised.value.do


@pytest.mark.parametrize("command", COMMANDS_OF_BOTH)
@pytest.mark.parametrize(("recipe", "flags"), [("conversations", TEXT), ("data", TALKS)])
def test_a_recipe_with_the_one_and_flags_with_the_other_are_refused_before_anything_is_done(
    models: dict[str, str], command: str, recipe: str, flags: tuple[str, ...], tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{recipe}: {{source: mine.json}}\n", encoding="utf-8")
    words = ["--config", str(file), "--output", str(tmp_path / "run"), "--device", "cpu", *flags]
    assert main([command, "--model", models["llava"], *words]) == 2
    said = capsys.readouterr().err
    assert "mine.json" in said
    assert flags[1] in said
    assert "--text_share" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("share", ["0", "1", "1.5", "-0.1", "some"])
@pytest.mark.parametrize("command", COMMANDS_OF_BOTH)
def test_a_share_is_between_nothing_and_all(command: str, share: str) -> None:
    with pytest.raises(ConfigError, match="--text_share") as raised:
        parse_job(command, ["m", *TALKS, *TEXT, "--text_share", share])
    assert_four_lines(raised.value)
