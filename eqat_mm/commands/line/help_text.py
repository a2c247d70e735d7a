"""What a command says of its options: `--help` those that most runs name, a line each; `--help-all` all, in full."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eqat_mm.commands.line.outline import Option

_WIDEST = 120
_NAMES = 34
_CLAUSE = re.compile("[;:] ")
_FEW = 16
"""Options that are all shown at once."""

_BASIC = """
model quantized reference output overwrite device precision dtype bits text_only text_share prompt image max_new_tokens
tasks limit generated count length temperature template images spool stream_dtype trains loss learning_rate
lr_projector epochs max_steps batch_size accumulation global_batch save_steps gradient_checkpointing deepspeed
dataloader_num_workers report_to gpu gpus ram disk json questions processes lora quant.bits quant.group_size
quant.symmetric start.init fit.epochs fit.batch_size fit.lr_weight fit.lr_scale calibration.source
calibration.length calibration.count data.source data.length data.count conversations.source
conversations.image_folder conversations.max_length conversations.template conversations.images
conversations.on_bad_sample conversations.held_out
text conversations plan group_size block_ap e2e_qp
"""
BASIC = frozenset(_BASIC.split())
"""Options that most runs name, in whatever command has them."""

_TOPICS = {
    "": "model run adapter shell prompt image quantized output",
    "what is trained": "trains loss bits group_size smooth smooth_samples text_share text_only",
    "steps and rates": """learning_rate lr_projector lr_floor warmup_steps epochs max_steps batch_size accumulation
        global_batch clip_norm seed""",
    "the machine": """device precision dtype cuda_graph batch_tokens spool stream_dtype commit gradient_checkpointing
        deepspeed dataloader_num_workers""",
    "what is kept and told": """save_steps held_out_steps held_out_kl keep_best logging_steps report_to overwrite
        recipe_for""",
}
"""Titles of `--help-all` for options that stand alone, with their names in order."""


def brief_help_of(command: str, about: str, options: Sequence[Option], settings: Mapping[str, Any], line: str) -> str:
    """Return the help of a command on one screen: see `help_of`."""
    all_of_them = [option for option in options if option.kind != "settings"]
    shown = all_of_them if len(all_of_them) <= _FEW else [option for option in all_of_them if option.name in BASIC]
    by_topic = [option for topic in _TOPICS for option in _about(topic, shown)]
    nested = [option for option in shown if "." in option.name]
    names = max(len(option.name) for option in shown) + len("  --  ")
    rows = [_row(option, settings, names) for option in (*by_topic, *nested)]
    left = len(all_of_them) - len(shown)
    more = [f"`eqat {command} --help-all` has all of this in full" + (f", and {left} more." if left else ".")]
    return "\n".join([*_head(command, about, options, line), "", *rows, *_foot(command), *more])


def _row(option: Option, settings: Mapping[str, Any], names: int) -> str:
    """Return one line: name, the beginning of what it does, its default unless that is nothing."""
    name, given = f"  --{option.name}".ljust(names), _default_of(option, settings)
    default = "" if given in ("none", "empty") else f"  [{textwrap.shorten(given, _NAMES, placeholder=' ...')}]"
    return name + _begun(option.does, max(20, _width() - len(name) - len(default))) + default


def _begun(words: str, room: int) -> str:
    """Return the first sentence, or as much of it as there is room for: whole clauses, if one fits, else words."""
    first = words.partition(". ")[0].rstrip(".")
    clauses = [first[: found.start()] for found in _CLAUSE.finditer(first)]
    whole = [clause for clause in (*clauses, first) if len(clause) <= room and _closed(clause)]
    return max(whole, key=len) if whole else textwrap.shorten(first, room, placeholder=" ...", break_on_hyphens=False)


def _closed(clause: str) -> bool:
    """Whether every quotation and bracket that is opened in a clause ends in it."""
    return clause.count("`") % 2 == 0 and clause.count("(") == clause.count(")")


def help_of(command: str, about: str, options: Sequence[Option], settings: Mapping[str, Any], line: str) -> str:
    """Return the help of a command.

    Args:
        command: its name.
        about: what it does.
        options: all.
        settings: of the recipe that it would take, nested: they stand for the defaults.
        line: what is said of that recipe; empty without one.
    """
    by_topic = {topic: _about(topic, options) for topic in _TOPICS}
    parts = [_part(topic and f"{topic}:", rows, settings) for topic, rows in by_topic.items() if rows]
    for group in (option for option in options if option.kind == "settings"):
        inner = [each for each in options if each.name.rpartition(".")[0] == group.name and each.kind != "settings"]
        parts.append(_part(f"--{group.name}: {_lowered(group.does)}", inner, settings))
    return "\n".join([*_head(command, about, options, line), *parts, *_foot(command)])


def _about(topic: str, options: Sequence[Option]) -> list[Option]:
    """Return the options of a topic that stand alone, in its order; those of none come behind the first."""
    alone = {option.name: option for option in options if "." not in option.name and option.kind != "settings"}
    listed = {name for names in _TOPICS.values() for name in names.split()}
    others = [] if topic else [option for name, option in alone.items() if name not in listed]
    return [alone[name] for name in _TOPICS[topic].split() if name in alone] + others


def _head(command: str, about: str, options: Sequence[Option], line: str) -> list[str]:
    first = next((f" [{name.upper()}]" for name in ("model", "shell") if name in {each.name for each in options}), "")
    usage = f"usage: eqat {command}{first} [--config RECIPE] [--option VALUE ...]"
    return [usage, "", _sentence(about), *([f"\n{line}"] if line else [])]


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."


def _lowered(words: str) -> str:
    return words[:1].lower() + words[1:] if words[1:2].islower() else words


def _part(title: str, options: Sequence[Option], settings: Mapping[str, Any]) -> str:
    rows = [row for option in options for row in _rows(option, settings)]
    return "\n".join(["", *textwrap.wrap(title, _width()), *rows])


def _rows(option: Option, settings: Mapping[str, Any]) -> Iterator[str]:
    default = _default_of(option, settings)
    words = default if default == "required" else f"default {default}"
    name = f"  --{option.name}"
    text = f"{option.does.rstrip('.')}. [{option.takes}; {words}]" if option.does else f"[{option.takes}; {words}]"
    lines = textwrap.wrap(text, _width() - _NAMES, break_on_hyphens=False)
    if len(name) < _NAMES:
        yield name.ljust(_NAMES) + lines.pop(0)
    else:
        yield name
    yield from (" " * _NAMES + line for line in lines)


def _default_of(option: Option, settings: Mapping[str, Any]) -> str:
    given = _looked_up(settings, option.name)
    if option.required and given is None:
        return "required"
    return _told(option.default if given is None else given)


def _told(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return "empty" if value in ([], "") else str(value)


def _looked_up(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return settings


def _width() -> int:
    return min(shutil.get_terminal_size().columns, _WIDEST)


def _foot(command: str) -> list[str]:
    return [
        "",
        "  --config RECIPE",
        "        YAML file, or name of a recipe (eqat recipes). Flags win over it, wherever they stand.",
        "  --print_config",
        "        Print all settings as YAML, and end.",
        "  -v",
        "        Say which kernels run.",
        "",
        f"With a model, `eqat {command} MODEL --help`, the defaults are those of its recipe.",
    ]
