"""`eqat`: one command per job. Options come from the jobs' dataclasses, YAML recipes and flags, in that order."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from eqat_mm import __version__
from eqat_mm.commands.line.commands import COMMANDS
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.ending import status_of, to_its_end
from eqat_mm.runtime.launcher import end_with_launcher
from eqat_mm.runtime.signals import stoppable

if TYPE_CHECKING:
    from eqat_mm.commands.line.outline import Option
    from eqat_mm.commands.line.taken import Taken
    from eqat_mm.commands.line.typed import Typed

_VERBOSE = {"-v", "--verbose"}

__all__ = ["main", "run_command", "script"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `eqat`; returns the exit status: 0, 2 for a user's error, 128 + N when stopped by signal N.

    Args:
        argv: the command and its arguments; None takes those of this process, which then ends with that status
            whenever a signal comes.
    """
    if argv is None:
        return to_its_end(lambda: main(sys.argv[1:]))
    arguments = _of_launchers_left_out(argv)
    if arguments[:1] == ["--version"]:
        print(__version__)
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    return run_command(arguments[0], arguments[1:])


def script(name: str) -> int:
    """Entry point of what a launcher starts: a command, with the arguments of this process; returns the exit status."""
    return to_its_end(lambda: run_command(name, sys.argv[1:]))


def run_command(name: str, argv: Sequence[str]) -> int:
    """Run one command with its own arguments, those of a launcher left out; returns the exit status."""
    argv = _of_launchers_left_out(argv)
    if _VERBOSE & set(argv):
        _tell_of_kernels()
        argv = [word for word in argv if word not in _VERBOSE]
    warnings.showwarning = _show_warning
    _print_anything()
    if "LOCAL_RANK" in os.environ:
        from eqat_mm.runtime.quiet import quiet_libraries

        end_with_launcher()
        quiet_libraries()
    return status_of(lambda: _run(name, argv))


def _tell_of_kernels() -> None:
    """Let each kind of kernel say, in a line of its own, which implementation runs."""
    from eqat_mm.runtime.progress import say

    kernels, handler = logging.getLogger("eqat_kernels"), logging.Handler()
    handler.emit = lambda record: say(record.getMessage())  # type: ignore[method-assign]
    kernels.addHandler(handler)
    kernels.setLevel(logging.INFO)


def _of_launchers_left_out(argv: Sequence[str]) -> list[str]:
    """Return the words without the one that deepspeed puts in front of them."""
    return [word for word in argv if not word.startswith("--local_rank")]


def _run(name: str, argv: Sequence[str]) -> None:
    spelled = name.replace("_", "-")
    if spelled not in COMMANDS:
        raise _unknown_command(name)
    job = parse_job(spelled, argv)
    _, function = COMMANDS[spelled].load()
    with stoppable():
        function(job)


def _print_anything() -> None:
    """Let a terminal that lacks a character show a question mark for it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def parse_job(name: str, argv: Sequence[str]) -> Any:
    """Return the job of a command that recipes and flags describe.

    Raises:
        ConfigError: unknown option, no model, or a value that is not allowed.
        SystemExit: after --help or --print_config.
    """
    from eqat_mm.commands.line.outline import options_of, stored_options
    from eqat_mm.commands.line.typed import typed

    options = stored_options(name)  # what is wrong with them is said before torch is imported
    if options is None:
        options = list(options_of(COMMANDS[name].load()[0]))
    words = typed(name, options, argv)
    taken = _taken(name, options, words)
    job_class, _ = COMMANDS[name].load()
    from eqat_mm.commands.line.resolved import job_with

    return job_with(name, job_class, options, words, taken)


def _taken(name: str, options: Sequence[Option], words: Typed) -> Taken:
    """Find the recipe of a command line; print help where it asks for that.

    Raises:
        ConfigError: no model.
        SystemExit: after --help or --help-all.
    """
    from eqat_mm.commands.line.help_text import brief_help_of, help_of
    from eqat_mm.commands.line.recipes import Recipe
    from eqat_mm.commands.line.taken import Taken, demo_recipe, recipe_taken, require_model_named

    command = COMMANDS[name]
    if command.recipe is not None:
        taken = demo_recipe(name, command.recipe)
    else:
        taken = recipe_taken(command.settings_of or name, options, words)
    if {"--help", "-h", "--help_all"} & set(words.flags):
        told = help_of if "--help_all" in words.flags else brief_help_of
        shown = [each.settings for each in (taken.beneath, *words.configs) if isinstance(each, Recipe)]
        print(told(name, command.help, options, shown[-1] if shown else {}, taken.line))
        raise SystemExit(0)
    require_model_named(name, options, words)
    return Taken(taken.beneath) if command.settings_of else taken


def _unknown_command(name: str) -> ConfigError:
    near = get_close_matches(name.lower().replace("_", "-"), COMMANDS, n=1)
    do = f"did you mean {near[0]}?" if near else "choose one of these commands"
    return ConfigError(f"eqat {ascii(name)[1:-1]}", ascii(name), ", ".join(COMMANDS), do)


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    from eqat_mm.runtime.progress import speaks

    if speaks() and not issubclass(category, FutureWarning):  # which is for the developers of what warns
        print(f"{category.__name__}: {message}", file=sys.stderr)


def _overview() -> str:
    rows = "\n".join(f"  {name:<13} {command.help}" for name, command in COMMANDS.items())
    return (
        "usage: eqat COMMAND [MODEL] [--config RECIPE] [--option VALUE ...]\n\n"
        f"{rows}\n\n"
        "eqat COMMAND --help lists its options; --print_config shows their values; -v says which kernels run."
    )


if __name__ == "__main__":
    sys.exit(main())
