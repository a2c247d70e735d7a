"""What a command says of its options: `--help` those that most runs name, a line each; `--help-all` all, in full."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eqat_mm.commands.outline import Option

_WIDEST = 120
_NAMES = 34
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


def brief_help_of(command: str, about: str, options: Sequence[Option], settings: Mapping[str, Any], line: str) -> str:
    """Return the help of a command on one screen: see `help_of`."""
    all_of_them = [option for option in options if option.kind != "settings"]
    shown = all_of_them if len(all_of_them) <= _FEW else [option for option in all_of_them if option.name in BASIC]
    rows = [_row(option, settings) for option in sorted(shown, key=lambda option: "." in option.name)]
    left = len(all_of_them) - len(shown)
    more = [f"`eqat {command} --help-all` has all of this in full" + (f", and {left} more." if left else ".")]
    return "\n".join([*_head(command, about, options, line), "", *rows, *_foot(command), *more])


def _row(option: Option, settings: Mapping[str, Any]) -> str:
    """Return one line: name, the beginning of what it does, its default."""
    name = f"  --{option.name} ".ljust(_NAMES)
    default = f"  [{textwrap.shorten(_default_of(option, settings), _NAMES, placeholder=' ...')}]"
    first, room = option.does.partition(". ")[0].rstrip("."), max(20, _width() - len(name) - len(default))
    return name + textwrap.shorten(first, room, placeholder=" ...") + default


def help_of(command: str, about: str, options: Sequence[Option], settings: Mapping[str, Any], line: str) -> str:
    """Return the help of a command.

    Args:
        command: its name.
        about: what it does.
        options: all.
        settings: of the recipe that it would take, nested: they stand for the defaults.
        line: what is said of that recipe; empty without one.
    """
    own = [option for option in options if option.own and "." not in option.name and option.kind != "settings"]
    shared = [option for option in options if not option.own and "." not in option.name and option.kind != "settings"]
    parts = [_part("", own, settings)]
    for group in (option for option in options if option.kind == "settings"):
        inner = [each for each in options if each.name.rpartition(".")[0] == group.name and each.kind != "settings"]
        parts.append(_part(f"--{group.name}: {_lowered(group.does)}", inner, settings))
    parts += [_part("training:", shared, settings)] if shared else []
    return "\n".join([*_head(command, about, options, line), *parts, *_foot(command)])


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
        "",
        f"With a model, `eqat {command} MODEL --help`, the defaults are those of its recipe.",
    ]
