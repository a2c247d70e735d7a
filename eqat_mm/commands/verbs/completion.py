"""`eqat completion`: what a shell needs to complete commands, options and values."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from eqat_mm.commands.line.outline import OPTIONS_FILE, Option
from eqat_mm.commands.line.recipes import recipe_names
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.settings import Settings
from llava_adapters.aliases import ALIASES

_CHOICES = re.compile(r"[\w.+-]+(?:, [\w.+-]+)+")

_SCRIPT = """\
_eqat() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]//_/-}} words=
    [[ $word == = ]] && word= && before="= $before"
    [[ $before == = ]] && before=${{COMP_WORDS[COMP_CWORD-2]}}
    before=${{before#= }}
    COMPREPLY=()
    if (( COMP_CWORD == 1 )); then
        words={commands}
    elif [[ $word == --* ]]; then
        case $command in
{options}
        esac
    else
        case "$command ${{before//-/_}}" in
{values}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _eqat eqat
"""
"""For bash; where nothing fits, it completes names of files. zsh reads the same."""

_FOR_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


@dataclass(frozen=True)
class CompletionJob(Settings):
    """Print a script that lets a shell complete what is typed after `eqat`.

    Attributes:
        shell: bash or zsh. In its start-up file: `eval "$(eqat completion bash)"`.
    """

    shell: Literal["bash", "zsh"] = "bash"


def completion(job: CompletionJob) -> str:
    """Print and return the script."""
    options = {name: [Option(*row) for row in rows] for name, rows in _kept().items()}
    script = _SCRIPT.format(
        commands=_quoted(options),
        options="\n".join(_case(name, map(_flag, _settable(each))) for name, each in options.items()),
        values="\n".join(line for name, each in options.items() for line in _values(name, each)),
    )
    script = (_FOR_ZSH if job.shell == "zsh" else "") + script
    say(script.rstrip())
    return script


def _kept() -> dict[str, list[list[Any]]]:
    commands: dict[str, list[list[Any]]] = json.loads(OPTIONS_FILE.read_text(encoding="utf-8"))["commands"]
    return commands


def _settable(options: Iterable[Option]) -> list[Option]:
    return [option for option in options if option.kind != "settings"]


def _flag(option: Option) -> str:
    return f"--{option.name}"


def _values(command: str, options: list[Option]) -> Iterator[str]:
    """Yield a line for each option whose values are known; what may stand for itself comes behind the command, too."""
    fitting = [name for name in recipe_names() if name.endswith(f"-{command}")]
    yield _case(f"'{command} __config'", fitting)
    for option in _settable(options):
        if words := _choices(option):
            yield _case(f"'{command} __{option.name}'", words)
        if option.name in ("model", "shell", "action"):
            yield _case(f"'{command} {command.replace('-', '_')}'", words)


def _choices(option: Option) -> list[str]:
    if option.name in ("model", "reference"):
        return list(ALIASES)
    if option.kind == "flag":
        return ["true", "false"]
    takes = option.takes.removesuffix(", or null")
    return takes.split(", ") if _CHOICES.fullmatch(takes) else []


def _case(pattern: str, words: Iterable[str]) -> str:
    return f"            {pattern}) words={_quoted(words)} ;;"


def _quoted(words: Iterable[str]) -> str:
    return shlex.quote(" ".join(words))
