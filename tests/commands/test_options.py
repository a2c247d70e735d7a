"""Flags and recipes of any kind end in a job or in four lines: near names, order, and a fuzz of both."""

from __future__ import annotations

import os
from dataclasses import MISSING, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from eqat_mm.cli import main, parse_job
from eqat_mm.commands.line.commands import COMMANDS
from eqat_mm.commands.line.options import names_of
from eqat_mm.errors import EqatError
from eqat_mm.runtime.settings import settings_in
from tests.checkpoint.files import assert_four_lines
from tests.faults.cases import words_of

FUZZ = settings(
    max_examples=int(os.environ.get("EQAT_FUZZ_EXAMPLES", "15")),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def job_of(command: str, *argv: str) -> Any:
    return parse_job(command, argv)


def refusal(command: str, *argv: str) -> EqatError:
    with pytest.raises(EqatError) as raised:
        job_of(command, *argv)
    assert_four_lines(raised.value)
    str(raised.value).encode()
    return raised.value


# ---- names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "flag", "meant"),
    [
        ("block-ap", "--fit.epoch", "--fit.epochs"),
        ("block-ap", "--quant.bit", "--quant.bits"),
        ("block-ap", "--calibration.lenght", "--calibration.length"),
        ("e2e-qp", "--conversations.on_bad_samples", "--conversations.on_bad_sample"),
        ("e2e-qp", "--print-confg", "--print_config"),
    ],
)
def test_a_mistaken_flag_is_answered_with_the_one_that_is_meant(command: str, flag: str, meant: str) -> None:
    refused = refusal(command, flag, "3")
    assert flag in refused.given
    assert meant in refused.do


@pytest.mark.parametrize("words", [["--output", ""], ["--output="]])
def test_an_empty_path_is_none(words: list[str]) -> None:
    assert refusal("rtn", *words).given == "an empty path"


def test_a_command_may_be_all_there_is() -> None:
    assert job_of("assets") == COMMANDS["assets"].load()[0]()


def test_an_abbreviated_flag_is_none() -> None:
    assert "--learning_rate" in refusal("e2e-qp", "--learning", "1e-4").do


def test_a_mistaken_choice_is_answered_with_the_one_that_is_meant() -> None:
    assert refusal("block-ap", "m", "--spool", "dsk").do == "did you mean --spool disk?"
    assert refusal("block-ap", "m", "--spool", "floppy").do == "set --spool to one of these"
    assert refusal("block-ap", "m", "--spool", "floppy").allowed == "auto, ram, disk"


def test_settings_in_one_word_are_told_by_name() -> None:
    refused = refusal("e2e-qp", "m", "--conversations", "x.json")
    assert (refused.where, refused.given) == ("--conversations", "'x.json'")
    assert "--conversations.source" in refused.do


def test_conversations_are_named_and_not_those_of_the_demo() -> None:
    refused = refusal("e2e-qp", "m", "--conversations.count", "5")
    assert (refused.where, refused.given) == ("--conversations", "no --conversations.source")


# ---- order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [["--config", "llava-1.5-w2g64-block-ap"], ["--config=llava-1.5-w2g64-block-ap"]])
def test_flags_win_over_the_recipe_wherever_they_stand(config: list[str]) -> None:
    flags = ["--model", "mine", "--quant.bits", "4", "--calibration.length", "256"]
    before, after = job_of("block-ap", *flags, *config), job_of("block-ap", *config, *flags)
    assert before == after
    assert (before.model, before.quant.bits, before.calibration.length) == ("mine", 4, 256)
    assert job_of("block-ap", "mine", *config).model == "mine"


def test_a_later_recipe_wins_over_an_earlier_one(tmp_path: Path) -> None:
    for name, epochs in (("one", 1), ("two", 2)):
        (tmp_path / f"{name}.yaml").write_text(f"fit: {{epochs: {epochs}}}\n", encoding="utf-8")
    recipes = ["--config", str(tmp_path / "one.yaml"), "--batch_tokens", "9", "--config", str(tmp_path / "two.yaml")]
    assert job_of("block-ap", "m", *recipes).fit.epochs == 2


# ---- paths ------------------------------------------------------------------------------------------


def test_a_quoted_tilde_is_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.yaml").write_text("group_size: 32\n", encoding="utf-8")
    job = job_of("rtn", "--model", "~/x", "--output", "~/y")
    assert (job.model, job.output) == (str(tmp_path / "x"), tmp_path / "y")
    assert job_of("demo-vlm", "--config", "~/r.yaml").group_size == 32


@pytest.mark.parametrize(("model", "named"), [(".", "here"), ("..", "above"), ("./", "here"), ("mine", "mine")])
def test_runs_of_a_folder_that_has_no_name_here_are_called_by_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str, named: str
) -> None:
    (tmp_path / "above" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "here")
    assert Path(job_of("rtn", "--model", model).model).name == named


# ---- one text, wherever a value comes from ------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("block-ap", "fit.epochs", -3),
        ("block-ap", "fit.beta2", 1.0),
        ("block-ap", "calibration.length", 1),
        ("e2e-qp", "batch_size", 0),
        ("demo", "block_ap.fit.lr_floor", 7.0),
        ("demo", "e2e_qp.max_steps", 0),
        ("llm-qat-table", "train.data.count", 0),
    ],
)
def test_a_flag_and_a_recipe_are_refused_alike(tmp_path: Path, command: str, option: str, value: float) -> None:
    file = tmp_path / "recipe.yaml"
    nested: Any = value
    for part in reversed(option.split(".")):
        nested = {part: nested}
    file.write_text(yaml.safe_dump(nested), encoding="utf-8")
    model = ["--model", "m"] if command in ("block-ap", "e2e-qp") else []
    by_flag = refusal(command, *model, f"--{option}", str(value))
    assert str(refusal(command, *model, "--config", str(file))) == str(by_flag)
    assert by_flag.where == f"--{option}"
    assert by_flag.given == str(value)


# ---- everything spelled out -------------------------------------------------------------------------

NEEDED = {"average_bits": "2.5", "to": "gguf", "conversations": '{"source": "s"}'}


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_may_be_spelled_out(command: str) -> None:
    of_job = fields(COMMANDS[command].load()[0])
    required = [each.name for each in of_job if each.default is MISSING and each.default_factory is MISSING]
    job = job_of(command, *(f"--{name}={NEEDED.get(name, 'm')}" for name in required))
    assert job_of(*words_of(command, job)) == job


# ---- groups that may be null ------------------------------------------------------------------------


def _groups(hints: dict[str, Any]) -> list[str]:
    """Options that are settings or null."""
    return [name for name, hint in hints.items() if settings_in(hint) is not None and type(None) in get_args(hint)]


@pytest.mark.parametrize("command", ["demo", "plan", "block-ap", "e2e-qp", "llm-qat"])
def test_nulls_in_a_group_that_may_be_null(command: str) -> None:
    hints = dict(names_of(COMMANDS[command].load()[0]))
    needed = {"model": "m"} | {f"{name}.source": "s" for name in _groups(hints) if name.endswith("conversations")}
    for group in _groups(hints):
        within = {name: hint for name, hint in hints.items() if name.startswith(f"{group}.")}
        nulls = [name for name in within if type(None) in get_args(within[name]) and name not in _groups(hints)]
        given = [f"--{name}={value}" for name, value in needed.items() if name in hints]
        job = job_of(command, *given, *(f"--{name}=null" for name in nulls))
        assert {name: attrgetter(name)(job) for name in nulls} == dict.fromkeys(nulls)
        assert nulls


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("max_steps", "abc", "an integer of 1 or more, or null"),
        ("lora.alpha", "null", "an integer of 1 or more"),
        ("trains", "foo", "scales, projector, scales+projector, lora, lora+projector"),
        ("conversations.source", "[1]", "text"),
    ],
)
def test_a_mistake_in_a_group_that_may_be_null(option: str, value: str, allowed: str) -> None:
    refused = refusal("demo", f"--e2e_qp_only.{option}={value}")
    assert refused.where == f"--e2e_qp_only.{option}"
    assert refused.given.strip("'") == value
    assert refused.allowed == allowed


# ---- anything ---------------------------------------------------------------------------------------

AWKWARD = [
    *("", " ", "-", "--", "0", "-1", "1", "-0.0", "0.5", "1e-5", "1e400", "-1e400", ".nan", ".inf", "nan"),
    *("true", "null"),
    *("9" * 5000, "9" * 400, "0x10", "1_000", "1:30", "[" * 50_000, "{" * 50_000, "- " * 50_000, "[1, 2]", "{a: 1}"),
    *("a: b", "a:", "!!int x", "!!python/name:os.system", "&a [*a]", "\udcff", "é", "a\nb", "\t", "'", '"', "@", "%s"),
    *("%(default)s", "x" * 400, "/", "..", "~", "~nobody/x", "2-2-2", "4-8-4", "2000-01-01", "class_path: os"),
]  # fmt: skip
KINDS = {name: COMMANDS[name].load()[0] for name in ("block-ap", "e2e-qp", "llm-qat", "eval", "generate", "demo-vlm")}
MODEL = {name: ["--model", "m"] for name in KINDS if name != "demo-vlm"}
OPTIONS = {name: [option for option, _ in names_of(kind)] for name, kind in KINDS.items()}


def options_of(command: str) -> st.SearchStrategy[list[str]]:
    name = st.sampled_from([*OPTIONS[command], "config", "conf", "x.y", ""]).map(lambda option: f"--{option}")
    value = st.sampled_from(AWKWARD) | st.text(max_size=20)
    pair = st.tuples(name, value)
    return st.lists(pair.map(list) | pair.map(lambda p: [f"{p[0]}={p[1]}"]) | value.map(lambda v: [v]), max_size=3).map(
        lambda words: [word for group in words for word in group]
    )


COMMAND_LINES = st.sampled_from(sorted(KINDS)).flatmap(
    lambda name: st.tuples(st.just(name), options_of(name).map(lambda words: [*MODEL.get(name, []), *words]))
)


def assert_a_job_or_four_lines(command: str, argv: list[str]) -> None:
    try:
        job_of(command, *argv)
    except EqatError as error:
        assert_four_lines(error)
        str(error).encode()
    except SystemExit as ended:  # after --help
        if ended.code not in (0, None):
            raise


@FUZZ
@given(COMMAND_LINES)
@example(("block-ap", ["--fit.lr_weight", "9" * 400]))
@example(("block-ap", ["--fit.epochs", "[" * 50_000]))
@example(("block-ap", ["--model", "\udcff"]))
@example(("block-ap", ["--config", "x" * 400]))
@example(("generate", ["--config", "~no-such-user/x", "--image", "~no-such-user/x"]))
@example(("llm-qat", ["--bits", "-".join(["9" * 5000] * 3)]))
def test_any_flags_make_a_job_or_four_lines(line: tuple[str, list[str]]) -> None:
    assert_a_job_or_four_lines(*line)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(AWKWARD),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
RECIPES = st.dictionaries(st.sampled_from([*OPTIONS["block-ap"], "x"]), VALUES, max_size=3).map(
    lambda settings: yaml.safe_dump(settings, allow_unicode=False).encode()
)
WHOLE = b"quant: {bits: 2, group_size: 64}\nfit:\n  epochs: 2\n  lr_weight: 2.0e-3\nrecipe_for: [a]\nlora: {alpha: 3}\n"
CHANGED = st.tuples(st.integers(0, len(WHOLE)), st.binary(max_size=4), st.integers(0, 9)).map(
    lambda change: WHOLE[: change[0]] + change[1] + WHOLE[change[0] + change[2] :]
)


@FUZZ
@given(recipe=RECIPES | CHANGED | st.binary(max_size=30))
@example(recipe=b"fit: .nan\n")
@example(recipe=b"fit:\n")
@example(recipe=b"fit: {epochs: '" + b"[" * 50_000 + b"'}\n")
@example(recipe=b"batch_tokens: " + b"9" * 5000)
@example(recipe=b"[" * 50_000)
@example(recipe="fit: {epochs: 1}\n".encode("utf-16"))
@example(recipe=b"seed: 1\nseed: 2\n")
def test_any_recipe_makes_a_job_or_four_lines(tmp_path_factory: pytest.TempPathFactory, recipe: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_bytes(recipe)
    assert_a_job_or_four_lines("block-ap", ["--model", "m", "--config", str(file)])


# ---- nothing is lost --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        ("e2e-qp", ["--batch_size", "0"]),
        ("e2e-qp", ["--learning_rate", "-1"]),
        ("e2e-qp", ["--deepspeed", "nowhere.json"]),
        ("block-ap", ["--fit.epochs", "-3"]),
        ("llm-qat", ["--warmup_steps", "5", "--max_steps", "4"]),
        ("generate-data", ["--count", "0"]),
        ("demo-vlm", ["--processes", "0"]),
    ],
)
def test_bad_numbers_leave_a_finished_run_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, argv: list[str]
) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "eqat.json").touch()
    assert main([command, "--output", str(tmp_path / "run"), "--overwrite", *argv]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 5
    assert (tmp_path / "run" / "model" / "eqat.json").exists()
