"""What a user typed after a command: every option known, and what may be abbreviated spelled out."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqat_mm.commands.line.elsewhere import ALIASES, ANSWERS, SAME_ANYWAY
from eqat_mm.commands.line.outline import Option
from eqat_mm.commands.line.recipes import Recipe, find_recipe
from eqat_mm.commands.line.settings_file import read_recipe, read_value
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.settings import is_text, shown

_ALWAYS = ("config", "help", "help_all", "print_config")


@dataclass(frozen=True)
class Typed:
    """What a user typed after a command.

    Attributes:
        configs: recipes and files, in their order: later ones win.
        flags: the rest; it wins over them wherever it stands.
    """

    configs: tuple[Recipe | Path, ...]
    flags: tuple[str, ...]

    def value(self, name: str) -> Any:
        """Return what is given for a setting such as `quant.bits`, as text or as YAML has it; None without."""
        if (flag := self._flag(name)) is not None:
            return flag
        if (group := self._flag(name.partition(".")[0])) is not None and "." in name:
            return _setting(read_value(group), name.partition(".")[2])
        found = [setting for config in self.configs if (setting := _setting(_settings_in(config), name)) is not None]
        return found[-1] if found else None

    def _flag(self, name: str) -> str | None:
        for flag, value in zip(reversed(self.flags), (None, *reversed(self.flags)), strict=False):
            word, equals, joined = flag.partition("=")
            if word == f"--{name}":
                return joined if equals else value
        return None

    def words(self, beneath: Recipe | None = None) -> list[str]:
        """Return it as a parser takes it, with the settings of a recipe `beneath`."""
        configs = (*([] if beneath is None else [beneath]), *self.configs)
        texts = [json.dumps(each.settings) if isinstance(each, Recipe) else str(each) for each in configs]
        return [word for text in texts for word in ("--config", text)] + list(self.flags)


def _settings_in(config: Recipe | Path) -> Mapping[str, Any]:
    return config.settings if isinstance(config, Recipe) else read_recipe(config)


def _setting(settings: Any, name: str) -> Any:
    """Return a setting by its dotted name, written flat or nested; None without."""
    if not isinstance(settings, Mapping) or name in settings:
        return settings.get(name) if isinstance(settings, Mapping) else None
    first, _, rest = name.partition(".")
    return _setting(settings.get(first), rest) if rest else None


def typed(command: str, options: Sequence[Option], argv: Sequence[str]) -> Typed:
    """Spell out what users may abbreviate, and tell recipes from flags.

    A first word without dashes is the model, or the run, adapter, shell or action where there is no model; words behind
    an action are its paths. `--overwrite` means `--overwrite true`. Dashes stand for underscores. A name that other
    training scripts use is taken where it means the same. What is given again of several (`--image`), or behind it, is
    one more.

    Args:
        command: its name.
        options: of the command.
        argv: what came after it.

    Raises:
        ConfigError: a flag that is none, text that is none, or an unreadable recipe.
    """
    known = {option.name: option for option in options}
    first = next((name for name in ("model", "run", "adapter", "shell", "action") if name in known), None)
    if argv and not argv[0].startswith("-") and first is not None:
        behind = [*argv[1:]]
        paths = ["--paths"] if "paths" in known and behind and not behind[0].startswith("-") else []
        argv = [f"--{first}", argv[0], *paths, *behind]
    configs: list[Recipe | Path] = []
    flags: list[str] = []
    words = iter(_spelled(command, known, argv))
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config":
            flags.append(word)
        elif equals or (value := next(words, "")):
            configs.append(_checked_recipe(command, known, value))
        else:
            flags.append(word)  # the parser says that a value is missing
    return Typed(tuple(configs), tuple(flags))


def _spelled(command: str, known: Mapping[str, Option], argv: Sequence[str]) -> Iterator[str]:
    """Yield the words of a command line with every flag by its name here."""
    given: set[str] = set()
    several = ""
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if not is_text(word):
            raise ConfigError(shown(flag), shown(value or word), "text", "write it in UTF-8, without NUL")
        if not flag.startswith("--") or flag == "--":
            yield from [several, word] if several else [word]
            continue
        name, several = _name_of(flag, known), ""
        own = value if equals else (words[0] if words and not words[0].startswith("--") else None)
        if name not in known and name not in _ALWAYS:
            if own is not None and not equals:
                words.pop(0)
            yield from _of_elsewhere(command, known, flag, own)
            continue
        kind = known[name].kind if name in known else "value"
        if kind == "place" and own == "":
            raise ConfigError(f"--{name}", "an empty path", "a file or folder", f"give one, or leave --{name} out")
        again = "+" if name in given and kind == "list" else ""  # jsonargparse appends
        given |= {name} & set(known)
        yield f"--{name}{again}{equals}{value}"
        if kind == "list":
            several = f"--{name}+"  # so does what comes behind the first
            if not equals and own is not None:
                yield words.pop(0)
        elif kind == "flag" and not equals and (not words or words[0].startswith("-")):
            yield "true"


def _name_of(flag: str, known: Mapping[str, Option]) -> str:
    name = flag.removeprefix("--").removesuffix("+")
    spelled = name.replace("-", "_")
    return spelled if spelled in known or spelled in _ALWAYS else name


def _of_elsewhere(command: str, known: Mapping[str, Option], flag: str, value: str | None) -> Iterator[str]:
    """Yield an option under the name it has here, given that of other scripts.

    Raises:
        ConfigError: there is none that means the same.
    """
    name = flag.removeprefix("--").replace("-", "_")
    if SAME_ANYWAY.get(name) == (value or "true").lower():
        return
    alias = ALIASES.get(name)
    ours = next((each for each in alias.options if each in known), None) if alias else None
    if alias is None or ours is None:
        raise _unknown(command, flag, known)
    if alias.values is None:
        yield from [f"--{ours}"] if value is None else [f"--{ours}", value]
    elif (value or "").lower() in alias.values:
        yield from [f"--{ours}", alias.values[(value or "").lower()]]
    else:
        allowed = ", ".join(filter(None, alias.values))
        raise ConfigError(flag, shown(value), allowed, f"say it with --{ours}: {known[ours].takes}")


def _unknown(command: str, flag: str, known: Mapping[str, Option]) -> ConfigError:
    name = flag.removeprefix("--")
    near = [f"--{each}" for each in _nearest(name, [*known, *_ALWAYS])]
    answer = ANSWERS.get(name.replace("-", "_"))
    return ConfigError(
        where=f"eqat {command}",
        given=f"unknown option {shown(flag)[1:-1]}",
        allowed=f"the options of `eqat {command} --help`",
        do=answer or (f"did you mean {' or '.join(near)}?" if near else f"see `eqat {command} --print_config` for all"),
    )


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    """Return the options that a mistaken one may stand for, the likeliest first."""
    spelled = name.replace("-", "_").lower()
    leaves = {each: each.rpartition(".")[2] for each in known}
    same = [each for each, leaf in leaves.items() if spelled in (each, leaf)]
    begun = [each for each, leaf in leaves.items() if each.startswith(spelled) or leaf.startswith(spelled)]
    close = difflib.get_close_matches(spelled, known, n=3)
    last = difflib.get_close_matches(spelled.rpartition(".")[2], set(leaves.values()), n=1)
    alike = [each for each, leaf in leaves.items() if leaf in last]
    return list(dict.fromkeys([*same, *begun, *close, *alike]))[:3]


def _checked_recipe(command: str, known: Mapping[str, Option], name: str) -> Recipe | Path:
    found = find_recipe(name)
    if isinstance(found, Path):
        read_recipe(found)
        return found
    unknown = sorted(set(found.settings) - set(known))
    if unknown:
        raise ConfigError(
            where=f"--config {name}",
            given=f"a recipe of {found.stage}, with {', '.join(unknown)}",
            allowed=f"a recipe whose name ends with the command, {command}",
            do="`eqat recipes` lists all",
        )
    return found
