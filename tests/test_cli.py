"""The command line: help, printed settings, recipes, and what a mistyped option is answered with."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from eqat_mm import __version__
from eqat_mm.cli import COMMANDS, main, parse_job
from eqat_mm.commands.recipes import recipes
from tests.tiny_model import Tiny, save_tiny

NAMES = sorted(COMMANDS)
RECIPES = recipes()


def command_of(recipe: str) -> str:
    """A recipe's name ends with its command."""
    (command,) = (name for name in COMMANDS if recipe.endswith(f"-{name}"))
    return command


def job_of(command: str, *argv: str) -> Any:
    return parse_job(command, COMMANDS[command].load()[0], argv)


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a command prints before it exits with status 0, with nothing on stderr."""
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code in (0, None)
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The four lines with which a command is refused."""
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    first, *lines = said.err.splitlines()
    assert first == "ConfigError"
    assert [line.split()[0] for line in lines] == ["where:", "given:", "allowed:", "do:"]
    assert all(len(line.split()) > 1 for line in lines)
    return said.err


# ---- help and settings ----------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]], ids=str)
def test_the_overview_lists_every_command(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said and COMMANDS[name].help in said for name in NAMES)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("command", NAMES)
def test_help_describes_every_option(capsys: pytest.CaptureFixture[str], command: str) -> None:
    said = printed(capsys, command, "--help")
    job_class, _ = COMMANDS[command].load()
    assert COMMANDS[command].help in " ".join(said.split())
    for field in fields(job_class):
        assert f"--{field.name}" in said
        assert any(f"{field.name}:" in str(base.__doc__) for base in job_class.__mro__)


@pytest.mark.parametrize("command", NAMES)
def test_printed_settings_are_settings(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str) -> None:
    file = tmp_path / "printed.yaml"
    file.write_text(printed(capsys, command, "--print_config"), encoding="utf-8")
    assert job_of(command, "--config", str(file)) == job_of(command)


def test_the_commands_run_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "eqat_mm.cli", "nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("ConfigError\n")


# ---- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_understood_by_its_command(capsys: pytest.CaptureFixture[str], name: str) -> None:
    said = printed(capsys, command_of(name), "--config", name, "--print_config")
    assert contains(yaml.safe_load(said), read(RECIPES[name]))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_which_models_it_is_for(name: str) -> None:
    job = job_of(command_of(name), "--config", name)
    parts = {"demo": ("block_ap", "e2e_qp", "e2e_qp_only"), "llm-qat-table": ("train",), "demo-vlm": ()}
    stages = [getattr(job, part) for part in parts[command_of(name)]] if command_of(name) in parts else [job]
    assert all(stage.model in stage.recipe_for for stage in stages if stage is not None)


def read(file: Path) -> Any:
    """The settings in a recipe, with those of the recipes that it names."""
    beside = {path.name: path for path in RECIPES.values()}
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {
        key: read(beside[value]) if isinstance(value, str) and value in beside else value
        for key, value in settings.items()
    }


def contains(whole: Any, part: Any) -> bool:
    """Whether every setting in `part` is in `whole`."""
    if isinstance(part, dict):
        return all(key in whole and contains(whole[key], value) for key, value in part.items())
    return bool(whole == part)


def test_the_demo_without_options_is_its_recipe() -> None:
    assert job_of("demo") == job_of("demo", "--config", str(COMMANDS["demo"].recipe))


def test_a_first_word_is_the_model() -> None:
    assert job_of("generate", "my-model", "--prompt", "Hello") == job_of(
        "generate", "--model", "my-model", "--prompt", "Hello"
    )
    assert job_of("block-ap", "smollm2-135m") == job_of("block-ap", "--model", "smollm2-135m")


def test_a_first_word_is_refused_where_there_is_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["assets", "smollm2-135m"]) == 2
    assert "unrecognized arguments: smollm2-135m" in " ".join(capsys.readouterr().err.split())


def test_options_win_over_the_recipe() -> None:
    name = "smollm2-135m-w2g64-block-ap"
    for config in (["--config", name], [f"--config={name}"]):
        job = job_of("block-ap", *config, "--fit.epochs", "7", "--quant.bits=3")
        assert (job.fit.epochs, job.quant.bits) == (7, 3)
        assert job.fit.lr_weight == job_of("block-ap", "--config", name).fit.lr_weight


@pytest.mark.parametrize(
    ("argv", "overwrite"),
    [
        (["--overwrite"], True),
        (["--overwrite", "--model", "m"], True),
        (["--overwrite=false"], False),
        (["--overwrite", "false"], False),
        ([], False),
    ],
    ids=str,
)
def test_a_flag_needs_no_value(argv: list[str], overwrite: bool) -> None:
    assert job_of("rtn", *argv).overwrite is overwrite


# ---- refused --------------------------------------------------------------------------------------


def test_an_unknown_command_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "blockap")
    assert "'blockap'" in said
    assert all(name in said for name in NAMES)


@pytest.mark.parametrize("command", NAMES)
def test_an_unknown_option(capsys: pytest.CaptureFixture[str], command: str) -> None:
    said = refusal(capsys, command, "--learning_speed", "3")
    assert "learning_speed" in said
    assert f"eqat {command} --help" in said


@pytest.mark.parametrize(
    ("command", "argv", "named"),
    [
        ("block-ap", ["--quant.bits", "two"], "quant.bits"),
        ("block-ap", ["--fit.epochs", "1.5"], "fit.epochs"),
        ("block-ap", ["--spool", "tape"], "spool"),
        ("e2e-qp", ["--loss", "mse"], "loss"),
        ("e2e-qp", ["--max_steps", "many"], "max_steps"),
        ("eval", ["--data.length", "long"], "data.length"),
        ("block-ap", ["--model"], "model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_value_of_the_wrong_type(
    capsys: pytest.CaptureFixture[str], command: str, argv: list[str], named: str
) -> None:
    assert named in refusal(capsys, command, *argv)


@pytest.mark.parametrize(
    ("command", "argv", "allowed"),
    [
        ("block-ap", ["--quant.bits", "5"], "2, 3, 4, 8"),
        ("block-ap", ["--quant.group_size", "48"], "32, 64, 128, 256, -1"),
        ("eval", ["--data.held_out_fraction", "1.5"], "between 0 and 1"),
        ("e2e-qp", ["--data.length", "0"], "1 or more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_value_out_of_its_range(
    capsys: pytest.CaptureFixture[str], command: str, argv: list[str], allowed: str
) -> None:
    assert allowed in refusal(capsys, command, *argv)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("learning_speed: 3\n", "learning_speed"),
        ("fit: {epoch: 3}\n", "epoch"),
        ("fit: {epochs: three}\n", "epochs"),
        ("quant: {bits: 5}\n", "2, 3, 4, 8"),
        ("fit: {epochs: 3\n", "config"),
        ("just words\n", "config"),
    ],
    ids=["unknown key", "unknown nested key", "wrong type", "out of range", "not YAML", "no mapping"],
)
def test_a_recipe_that_does_not_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    assert named in refusal(capsys, "block-ap", "--config", str(file))


def test_an_unknown_recipe_lists_the_shipped_ones(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--config", "smollm3"], ["--config=smollm3"]):
        said = refusal(capsys, "block-ap", *argv)
        assert "'smollm3'" in said
        assert all(name in said for name in RECIPES)


def test_a_recipe_of_another_command(capsys: pytest.CaptureFixture[str]) -> None:
    refusal(capsys, "e2e-qp", "--config", "smollm2-135m-w2g64-block-ap")


# ---- warnings -------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return save_tiny(tmp_path)


def test_settings_that_are_not_for_the_model_are_warned_of(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--quant.group_size", "32", "--calibration.source", str(tiny.text), "--output", str(tmp_path)]
    argv = ["block-ap", "--model", str(tiny.folder), *options, "--calibration.length", "1000000"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(argv) == 2
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith("UserWarning: block-ap: these settings are the paper's, tuned for Llama-2 7B and up")
    assert f"not for {tiny.folder}" in first
    assert rest[0] == "DataError"
