"""The command line: help, printed settings, recipes, and what a mistyped option is answered with."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from eqat_kernels.dispatch import _choose, _log_once
from eqat_mm import __version__
from eqat_mm.cli import main, parse_job
from eqat_mm.commands.line.commands import COMMANDS
from eqat_mm.commands.line.options import names_of
from eqat_mm.commands.line.recipes import named_recipe, recipe_names
from eqat_mm.runtime.settings import limits_in, settings_in
from tests.tiny_model import Tiny, save_tiny

NAMES = sorted(COMMANDS)
NEEDS_A_MODEL = ("block-ap", "chat", "e2e-qp", "eval", "generate", "generate-data", "llm-qat", "plan", "rtn")
NEEDS_A_MODEL += ("verify", "prepare-data", "quantize")
RECIPES = recipe_names()
MODEL = {name: ["--model", "m"] for name in NAMES if name in NEEDS_A_MODEL}
MODEL["prepare-data"] += ["--conversations.source", "mix.json"]
MODEL["report"] = MODEL["check-run"] = ["--run", "runs/m-w2g64"]
MODEL["export"] = ["--model", "m", "--to", "gguf"]
MODEL["allocate"] = ["--model", "m", "--average_bits", "3"]


def command_of(recipe: str) -> str:
    """A recipe's name ends with its command."""
    (command,) = (name for name in COMMANDS if recipe.endswith(f"-{name}"))
    return command


def job_of(command: str, *argv: str) -> Any:
    return parse_job(command, argv)


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
    said = printed(capsys, command, "--help-all")
    job_class, _ = COMMANDS[command].load()
    assert COMMANDS[command].help[1:] in " ".join(said.split())
    for field in fields(job_class):
        assert f"--{field.name}" in said
        assert any(f"{field.name}:" in str(base.__doc__) for base in job_class.__mro__)
    assert all(f"--{name}" in said for name, hint in names_of(job_class) if settings_in(hint) is None)


@pytest.mark.parametrize("command", NAMES)
def test_printed_settings_are_settings(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str) -> None:
    file = tmp_path / "printed.yaml"
    file.write_text(printed(capsys, command, *MODEL.get(command, []), "--print_config"), encoding="utf-8")
    assert job_of(command, "--config", str(file)) == job_of(command, *MODEL.get(command, []))


def test_the_kernels_that_run_are_said_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = save_tiny(tmp_path)
    words = ["rtn", str(tiny.folder), "--quant.group_size", "32", "--output", str(tmp_path / "rtn")]
    _choose.cache_clear()
    _log_once.cache_clear()
    assert main([*words, "-v"]) == 0
    logging.getLogger("eqat_kernels").handlers.clear()
    said = capsys.readouterr().out
    assert re.search(r"^pack on cpu: (cpu|reference)$", said, re.M)


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
    command, recipe = command_of(name), named_recipe(name)
    assert recipe is not None
    said = printed(capsys, command, *MODEL.get(command, []), "--config", name, "--print_config")
    assert contains(yaml.safe_load(said), recipe.settings)


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
        job = job_of("block-ap", "m", *config, "--fit.epochs", "7", "--quant.bits=3")
        assert (job.fit.epochs, job.quant.bits) == (7, 3)
        assert job.fit.lr_weight == job_of("block-ap", "m", "--config", name).fit.lr_weight


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
    assert job_of("rtn", "--model", "m", *argv).overwrite is overwrite


# ---- refused --------------------------------------------------------------------------------------


def test_an_unknown_command_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "blockap")
    assert "did you mean block-ap?" in said
    assert "choose one of these" in refusal(capsys, "xyz")
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
    assert named in refusal(capsys, command, *MODEL.get(command, []), *argv)


@pytest.mark.parametrize(
    ("command", "argv", "allowed"),
    [
        ("block-ap", ["--quant.bits", "5"], "2, 3, 4, 8"),
        ("block-ap", ["--quant.group_size", "48"], "32, 64, 128, 256, -1"),
        ("eval", ["--data.held_out_fraction", "1.5"], "above 0, below 1"),
        ("e2e-qp", ["--data.length", "1"], "2 or more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_value_out_of_its_range(
    capsys: pytest.CaptureFixture[str], command: str, argv: list[str], allowed: str
) -> None:
    assert allowed in refusal(capsys, command, *MODEL.get(command, []), *argv)


IMPOSSIBLE = {
    "block-ap": (
        *(
            "fit.epochs -3",
            "fit.batch_size 0",
            "fit.lanes 0",
            "fit.lr_weight -1",
            "fit.lr_scale .nan",
            "fit.lr_norm -1",
        ),
        *("fit.lr_zero_point 1e400", "fit.lr_floor 7", "fit.lr_floor -1", "fit.warmup 5", "fit.warmup -1"),
        *("fit.beta2 2", "fit.beta2 1", "fit.weight_decay -1", "fit.clip_norm 0", "fit.clip_norm -1"),
        *("fit.validation_samples -5", "fit.patience -1", "fit.patience 0", "fit.max_skipped -1", "fit.max_retries -1"),
        *("start.samples 0", "start.samples -1", "start.correction_damping 0", "batch_tokens -1", "batch_tokens 0"),
        *("seed -1", "calibration.count 0", "calibration.length 1", "calibration.seed -1", "calibration.split_seed -1"),
        *("calibration.held_out_fraction 0", "calibration.count 99999999999999999999", "quant.bits 0"),
    ),
    "e2e-qp": (
        *("max_steps 0", "max_steps -1", "max_steps -5", "batch_size 0", "accumulation 0", "accumulation -1"),
        *("logging_steps 0", "logging_steps -1", "save_steps -5", "learning_rate -1", "learning_rate 0", "lr_floor 2"),
        *("lr_floor -1", "warmup_steps -1", "seed -1", "seed 4294967296", "epochs 0", "epochs -1", "epochs .inf"),
        *("clip_norm 0", "lr_projector 0", "lora.rank 0", "lora.alpha -1", "lora.learning_rate 0", "data.length 1"),
        *("conversations.count 0", "conversations.max_length 0", "conversations.text_warmup_steps -1"),
    ),
    "llm-qat": ("max_steps -1", "smooth 2", "smooth -1", "smooth_samples 0", "group_size 7", "bits 4-8", "bits 5-8-8"),
    "eval": ("batch_size 0", "limit 0", "data.count 0"),
    "generate": ("max_new_tokens 0", "temperature -1", "top_p 0", "top_p 1.5", "seed -1"),
    "generate-data": ("count 0", "length 1", "batch_size 0", "min_tokens -1", "max_repeated 2", "seed -1"),
    "demo": ("batch_size 0", "e2e_qp.max_steps 0", "block_ap.fit.epochs -1", "data.count 0"),
    "demo-vlm": (
        "processes 0",
        "questions 0",
        "questions_full_precision -1",
        "batch_size 0",
        "group_size 3",
        "bits []",
    ),
    "llm-qat-table": ("smooth 2", "batch_size 0", "train.batch_size 0", "bits []", "bits [4-8-9]"),
    "plan": ("gpus 0", "ram -1", "disk .nan", "conversations 0", "llm_qat.smooth 2", "evaluation.count 0"),
}


@pytest.mark.parametrize(
    ("command", "option"), [(command, option) for command, options in IMPOSSIBLE.items() for option in options]
)
def test_a_number_that_cannot_be(capsys: pytest.CaptureFixture[str], command: str, option: str) -> None:
    name, value = option.split()
    source = ["--conversations.source", "c.json"] if name.startswith("conversations.") else []
    words = [*MODEL.get(command, []), *source, f"--{name}", value]
    assert f"--{name}" in refusal(capsys, command, *words).splitlines()[1]


def test_a_warm_up_longer_than_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "e2e-qp", "m", "--warmup_steps", "100", "--max_steps", "2")
    assert "100, in a run of 2 steps" in said
    assert job_of("e2e-qp", "m", "--warmup_steps", "2", "--max_steps", "2").warmup_steps == 2
    assert job_of("llm-qat", "m", "--warmup_steps", "2", "--max_steps", "0").trains is False


def test_training_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    rates = [word for name in ("weight", "scale", "norm") for word in (f"--fit.lr_{name}", "0")]
    assert "nothing would be trained" in refusal(capsys, "block-ap", "m", *rates)
    assert job_of("block-ap", "m", *rates, "--fit.epochs", "0").fit.epochs == 0


@pytest.mark.parametrize("command", NAMES)
def test_every_number_of_every_job_has_a_range(command: str) -> None:
    without = [
        name
        for name, hint in names_of(COMMANDS[command].load()[0])
        if {int, float} & set(_kinds(hint)) and not list(limits_in(hint))
    ]
    assert without == []


def _kinds(hint: Any) -> list[Any]:
    """The types that a field is made of, such as float and None."""
    inner = [kind for part in get_args(hint) if not isinstance(part, str) for kind in _kinds(part)]
    return [hint, *inner]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("learning_speed: 3\n", "learning_speed"),
        ("fit: {epoch: 3}\n", "epoch"),
        ("fit: {epochs: three}\n", "epochs"),
        ("quant: {bits: 5}\n", "2, 3, 4, 8"),
        ("fit: .nan\n", "fit"),
        ("fit:\n", "fit"),
        ("fit: {lr_weight: .nan}\n", "fit.lr_weight"),
        ("fit: {epochs: 3\n", "config"),
        ("just words\n", "config"),
    ],
    ids=[
        *("unknown key", "unknown nested key", "wrong type", "out of range", "no settings", "nothing", "not a number"),
        *("not YAML", "no mapping"),
    ],
)
def test_a_recipe_that_does_not_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    assert named in refusal(capsys, "block-ap", "m", "--config", str(file))


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
    said = capsys.readouterr().err
    warned, refused = said.index("UserWarning: block-ap: these settings are the paper's"), said.index("DataError\n")
    assert warned < refused
    assert f"tuned for Llama-2 7B and up, not for {tiny.folder}" in said
