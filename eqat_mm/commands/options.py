"""From what a user types after a command to its job: every flag known, every value allowed, or four lines."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from eqat_mm.commands.recipes import recipe_path
from eqat_mm.commands.settings_file import check_names, read_recipe
from eqat_mm.errors import ConfigError, EqatError
from eqat_mm.runtime.settings import Settings, hints_of, is_text, limits_in, require, settings_in, shown

Job = TypeVar("Job", bound=Settings)

_ELSEWHERE = {
    "bf16": "precision",
    "data_path": "conversations.source",
    "gradient_accumulation_steps": "accumulation",
    "lora_enable": "trains",
    "lr": "learning_rate",
    "max_grad_norm": "clip_norm",
    "model_max_length": "conversations.max_length",
    "model_name_or_path": "model",
    "num_train_epochs": "epochs",
    "output_dir": "output",
    "per_device_train_batch_size": "batch_size",
    "warmup_ratio": "warmup_steps",
}
"""What other training scripts call it."""

_RAISED = (ArgumentError, ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What jsonargparse lets out, over values that it did not expect."""


def names_of(kind: type[Settings], under: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the name of every option of a job, `fit.epochs`, with its type."""
    for name, hint in hints_of(kind).items():
        yield under + name, hint
        nested = settings_in(hint)
        if nested is not None:
            yield from names_of(nested, f"{under}{name}.")


def spelled_out(command: str, kind: type[Settings], argv: Sequence[str]) -> list[str]:
    """Spell out what users may abbreviate, recipes first, for flags win over them wherever they stand.

    A first word without dashes is the model; `--overwrite` means `--overwrite true`, and `--train-projector`
    `--trains scales+projector`. What is given again of several (`--image`), or behind it, is one more.

    Raises:
        ConfigError: a flag that is none, text that is none, or an unreadable recipe.
    """
    hints = hints_of(kind)
    if argv and not argv[0].startswith("-") and "model" in hints:
        argv = ["--model", *argv]
    _check_flags(command, kind, argv)
    recipes: list[str] = []
    flags: list[str] = []
    words = iter(_with_values(hints, argv))
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config":
            flags.append(word)
        elif equals or (value := next(words, "")):
            recipes += ["--config", str(_checked_recipe(kind, value))]
        else:
            flags.append(word)  # the parser says that a value is missing
    return recipes + flags


def _with_values(hints: dict[str, Any], argv: Sequence[str]) -> Iterator[str]:
    given: set[str] = set()
    several, filled = "", False
    for word, after in zip(argv, [*argv[1:], "-"], strict=False):
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            several, filled = flag if _takes_several(hints.get(flag.removeprefix("--"))) else "", bool(equals)
        elif several and filled:
            yield f"{several}+"
        else:
            filled = True
        if flag in given and flag == several:
            word = f"{flag}+{equals}{value}"  # jsonargparse appends
        given.add(flag)
        yield from ["--trains", "scales+projector"] if word == "--train-projector" else [word]
        if hints.get(word.removeprefix("--")) is bool and after.startswith("-"):
            yield "true"


def _takes_several(hint: Any) -> bool:
    return any(get_origin(each) is list for each in (hint, *get_args(hint)))


def _checked_recipe(kind: type[Settings], name: str) -> Path:
    path = recipe_path(name)
    check_names(kind, read_recipe(path), path)
    return path


def _check_flags(command: str, kind: type[Settings], argv: Sequence[str]) -> None:
    known = [name for name, _ in names_of(kind)]
    named = [*known, "config", "help", "print_config"]
    optional = [f"{name}.help" for name, hint in names_of(kind) if settings_in(hint) not in (None, hint)]
    also = ["train-projector"] if "trains" in known else []
    places = {f"--{name}" for name, hint in names_of(kind) if Path in (hint, *get_args(hint))}
    for word, after in zip(argv, [*argv[1:], None], strict=False):
        flag, equals, value = word.partition("=")
        if flag in places and (value if equals else after) == "":
            raise ConfigError(flag, "an empty path", "a file or folder", f"give one, or leave {flag} out")
        if not is_text(word):
            raise ConfigError(shown(flag), shown(value or word), "text", "write it in UTF-8, without NUL")
        if flag.startswith("--") and flag.removeprefix("--").removesuffix("+") not in [*named, *optional, *also]:
            raise _unknown(command, flag.removeprefix("--"), named)


def _unknown(command: str, name: str, known: list[str]) -> ConfigError:
    near = [f"--{each}" for each in _nearest(name, known)]
    return ConfigError(
        where=f"eqat {command}",
        given=f"unknown option --{name}",
        allowed=f"the options of `eqat {command} --help`",
        do=f"did you mean {' or '.join(near)}?" if near else f"see `eqat {command} --print_config` for all with values",
    )


def _nearest(name: str, known: list[str]) -> list[str]:
    """Return the options that a mistaken one may stand for, the likeliest first."""
    spelled = name.replace("-", "_").lower()
    leaves = {each: each.rpartition(".")[2] for each in known}
    elsewhere = [each for each in (_ELSEWHERE.get(spelled),) if each in known]
    same = [each for each, leaf in leaves.items() if spelled in (each, leaf)]
    begun = [each for each, leaf in leaves.items() if each.startswith(spelled) or leaf.startswith(spelled)]
    close = difflib.get_close_matches(spelled, known, n=3)
    last = difflib.get_close_matches(spelled.rpartition(".")[2], set(leaves.values()), n=1)
    alike = [each for each, leaf in leaves.items() if leaf in last]
    return list(dict.fromkeys([*elsewhere, *same, *begun, *close, *alike]))[:3]


def with_ranges(parser: ArgumentParser, kind: type[Settings]) -> None:
    """Let the help of every option say which numbers it takes."""
    hints = dict(names_of(kind))
    for action in parser._actions:
        words = [f"{limit.words}." for limit in limits_in(hints.get(action.dest))]
        if words and action.help:
            action.help = f"{action.help} {words[0]}"


def parsed(parser: ArgumentParser, command: str, kind: type[Job], argv: Sequence[str]) -> Job:
    """Return the job that a parser reads from its arguments.

    Raises:
        ConfigError: a value that is not allowed.
        SystemExit: after --help or --print_config.
    """
    try:
        values = parser.parse_args(list(argv))
    except _RAISED as error:
        raise _refused(command, kind, error) from error
    return built(kind, values)


def built(kind: type[Job], values: Namespace, under: str = "") -> Job:
    """Return the dataclass with these values.

    Args:
        kind: dataclass of settings.
        values: of its fields; those of dataclasses in it are namespaces.
        under: option that it is the value of, `fit.`.

    Raises:
        ConfigError: a value that is not allowed, with the option as a user types it.
    """
    given = {}
    for name, hint in hints_of(kind).items():
        value, nested = values[name], settings_in(hint)
        if nested is not None and isinstance(value, Namespace):
            value = built(nested, value, f"{under}{name}.")
        given[name] = _at_home(value, name)
    try:
        return kind(**given)
    except ConfigError as error:
        said = [text.replace(f"--{kind.option}", f"--{under}") for text in (error.where, error.do)]
        raise ConfigError(said[0], error.given, error.allowed, said[1]) from error


def _at_home(value: Any, name: str) -> Any:
    """Return the value of an option: of a path with `~` replaced, of a model with a name to call its runs by."""
    if isinstance(value, Path):
        return Path(os.path.expanduser(value)) if is_text(str(value)) else value
    if name not in ("model", "reference") or not isinstance(value, str) or not is_text(value):
        return value
    value = os.path.expanduser(value)
    return os.path.abspath(value) if Path(value).name in ("", "..") else value


def _refused(command: str, kind: type[Settings], error: Exception) -> EqatError:
    """Return what a user is told where the parser refuses something."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, EqatError):
            return cause
        cause = cause.__cause__ or cause.__context__
    message = " ".join(str(error).encode("utf-8", "backslashreplace").decode().split())
    hints = dict(names_of(kind))
    found = re.search(r'[Kk]ey "([\w.]+)"', message)
    values = re.findall(r'(?:(?:Given|Got) value: |load config ")(.*?)"?$', str(error), re.MULTILINE)
    if found and values and found[1] in hints:
        return _not_a_value(found[1], hints[found[1]], values[-1])
    return ConfigError(
        where=f"eqat {command}",
        given=shown(message).strip("'\""),
        allowed=f"the options of `eqat {command} --help`",
        do=f"correct it; `eqat {command} --print_config` shows every option with its value",
    )


def _not_a_value(name: str, hint: Any, value: str) -> ConfigError:
    nested = settings_in(hint)
    if nested is not None:
        first = next(iter(hints_of(nested)))
        return ConfigError(f"--{name}", shown(value), f"--{name}.{first} and others", f"name one: --{name}.{first} ...")
    try:
        require(hint, None if value == "None" else value, f"--{name}")
    except ConfigError as refusal:
        return refusal
    return ConfigError(f"--{name}", shown(value), str(hint), f"correct --{name}")
