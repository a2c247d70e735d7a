"""`eqat`: one command per job. Options come from the jobs' dataclasses, YAML recipes and flags, in that order."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from eqat_mm import __version__
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.ending import status_of, to_its_end
from eqat_mm.runtime.launcher import end_with_launcher
from eqat_mm.runtime.signals import stoppable

if TYPE_CHECKING:
    from eqat_mm.commands.outline import Option
    from eqat_mm.commands.taken import Taken
    from eqat_mm.commands.typed import Typed

__all__ = ["main", "run_command", "script"]


@dataclass(frozen=True)
class _Command:
    help: str
    load: Callable[[], tuple[type[Any], Callable[[Any], Any]]]
    recipe: str | None = None
    settings_of: str | None = None
    """Command whose recipes count; its own by default."""


def _block_ap() -> tuple[type[Any], Callable[[Any], Any]]:
    from eqat_mm.commands.quantize import BlockAPJob, block_ap

    return BlockAPJob, block_ap


def _quantize() -> tuple[type[Any], Callable[[Any], Any]]:
    from eqat_mm.commands.whole import QuantizeJob, quantize

    return QuantizeJob, quantize


def _rtn() -> tuple[type[Any], Callable[[Any], Any]]:
    from eqat_mm.commands.quantize import RTNJob, rtn

    return RTNJob, rtn


def _e2e_qp() -> tuple[type[Any], Callable[[Any], Any]]:
    from eqat_mm.commands.tune import E2EQPJob, e2e_qp

    return E2EQPJob, e2e_qp


def _llm_qat() -> tuple[type[Any], Callable[[Any], Any]]:
    from eqat_mm.commands.llm_qat import LLMQATJob, llm_qat

    return LLMQATJob, llm_qat


def _llm_qat_table() -> tuple[type[Any], Callable[[Any], Any]]:
    from eqat_mm.commands.llm_qat_table import LLMQATTableJob, llm_qat_table

    return LLMQATTableJob, llm_qat_table


def _eval() -> tuple[type[Any], Callable[[Any], Any]]:
    from eqat_mm.commands.evaluate import EvalJob, evaluate

    return EvalJob, evaluate


def _generate() -> tuple[type[Any], Callable[[Any], Any]]:
    from eqat_mm.commands.generate import GenerateJob, generate

    return GenerateJob, generate


def _chat() -> tuple[type[Any], Callable[[Any], Any]]:
    from eqat_mm.commands.chat import ChatJob, chat

    return ChatJob, chat


def _generate_data() -> tuple[type[Any], Callable[[Any], Any]]:
    from eqat_mm.commands.generate_data import GenerateDataJob, generate_data

    return GenerateDataJob, generate_data


def _demo() -> tuple[type[Any], Callable[[Any], Any]]:
    from eqat_mm.commands.ladder import LadderJob, ladder

    return LadderJob, ladder


def _demo_vlm() -> tuple[type[Any], Callable[[Any], Any]]:
    from eqat_mm.commands.vlm_ladder import VLMLadderJob, vlm_ladder

    return VLMLadderJob, vlm_ladder


def _prepare_data() -> tuple[type[Any], Callable[[Any], Any]]:
    from eqat_mm.commands.prepare_data import PrepareDataJob, prepare_data

    return PrepareDataJob, prepare_data


def _assets() -> tuple[type[Any], Callable[[Any], Any]]:
    from eqat_mm.commands.assets import AssetsJob, assets

    return AssetsJob, assets


def _verify() -> tuple[type[Any], Callable[[Any], Any]]:
    from eqat_mm.commands.verify import VerifyJob, verify

    return VerifyJob, verify


def _recipes() -> tuple[type[Any], Callable[[Any], Any]]:
    from eqat_mm.commands.recipe_list import RecipesJob, list_recipes

    return RecipesJob, list_recipes


def _check_adapter() -> tuple[type[Any], Callable[[Any], Any]]:
    from eqat_mm.commands.check_adapter import CheckAdapterJob, check_adapter

    return CheckAdapterJob, check_adapter


def _completion() -> tuple[type[Any], Callable[[Any], Any]]:
    from eqat_mm.commands.completion import CompletionJob, completion

    return CompletionJob, completion


def _plan() -> tuple[type[Any], Callable[[Any], Any]]:
    from eqat_mm.commands.plan import PlanJob, plan

    return PlanJob, plan


def _report() -> tuple[type[Any], Callable[[Any], Any]]:
    from eqat_mm.commands.report import ReportJob, report

    return ReportJob, report


COMMANDS: dict[str, _Command] = {
    "demo": _Command(
        "quantize SmolLM2-135M to 2 bits and print the ladder of stages", _demo, "smollm2-135m-w2g64-demo"
    ),
    "demo-vlm": _Command("the same for a small LLaVA, with questions about images, scored by lmms-eval", _demo_vlm),
    "plan": _Command("what a run will need: memory, disk, hours by phase", _plan, settings_of="block-ap"),
    "quantize": _Command("all of it: a plan, Block-AP, E2E-QP, an evaluation and one table", _quantize),
    "block-ap": _Command("train W, s, z of one block at a time and write a packed checkpoint", _block_ap),
    "e2e-qp": _Command("train the step sizes of a packed checkpoint end to end", _e2e_qp),
    "rtn": _Command("round to nearest: the baseline", _rtn),
    "llm-qat": _Command("train all weights with weights, activations and KV cache quantized", _llm_qat),
    "llm-qat-table": _Command(
        "rounding, SmoothQuant and LLM-QAT at several bit widths: one table",
        _llm_qat_table,
        "smollm2-135m-llm-qat-table",
    ),
    "eval": _Command("perplexity on held-out text, KL and agreement with a reference", _eval),
    "generate": _Command("write text, about images if given, with a packed or full-precision model", _generate),
    "chat": _Command("talk with a model, about images if shown, line by line", _chat),
    "generate-data": _Command("let a model write its own training text, in one or several processes", _generate_data),
    "report": _Command("one page about a run, or all runs of a model: ladder, losses, grids, provenance", _report),
    "verify": _Command("check every file of a packed checkpoint against its hash", _verify),
    "check-adapter": _Command(
        "try an adapter on a tiny model of its kind: what it declares, trains and writes", _check_adapter
    ),
    "prepare-data": _Command("look through conversations once: what is wrong, how long, an index of it", _prepare_data),
    "recipes": _Command("list the shipped settings by family of models, or print those of a model", _recipes),
    "assets": _Command("list the short names of models and data, or fetch some", _assets),
    "completion": _Command("print what bash or zsh needs to complete commands, options and values", _completion),
}


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
    warnings.showwarning = _show_warning
    _print_anything()
    if "LOCAL_RANK" in os.environ:
        from eqat_mm.runtime.quiet import quiet_libraries

        end_with_launcher()
        quiet_libraries()
    return status_of(lambda: _run(name, argv))


def _of_launchers_left_out(argv: Sequence[str]) -> list[str]:
    """Return the words without the one that deepspeed puts in front of them."""
    return [word for word in argv if not word.startswith("--local_rank")]


def _run(name: str, argv: Sequence[str]) -> None:
    from eqat_mm.commands.outline import options_of, stored_options
    from eqat_mm.commands.typed import typed

    spelled = name.replace("_", "-")
    if spelled not in COMMANDS:
        raise _unknown_command(name)
    options = stored_options(spelled)  # what is wrong with them is said before torch is imported
    if options is None:
        options = list(options_of(COMMANDS[spelled].load()[0]))
    words = typed(spelled, options, argv)
    taken = _taken(spelled, options, words)
    job_class, function = COMMANDS[spelled].load()
    from eqat_mm.commands.resolved import job_with

    job = job_with(spelled, job_class, options, words, taken)
    with stoppable():
        function(job)


def _print_anything() -> None:
    """Let a terminal that lacks a character show a question mark for it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def parse_job(name: str, job_class: type[Any], argv: Sequence[str]) -> Any:
    """Return the job that recipes and flags describe.

    Raises:
        ConfigError: unknown option, no model, or a value that is not allowed.
        SystemExit: after --help or --print_config.
    """
    from eqat_mm.commands.outline import options_of
    from eqat_mm.commands.resolved import job_with
    from eqat_mm.commands.typed import typed

    options = list(options_of(job_class))
    words = typed(name, options, argv)
    return job_with(name, job_class, options, words, _taken(name, options, words))


def _taken(name: str, options: Sequence[Option], words: Typed) -> Taken:
    """Find the recipe of a command line; print help where it asks for that.

    Raises:
        ConfigError: no model.
        SystemExit: after --help or --help-all.
    """
    from eqat_mm.commands.help_text import brief_help_of, help_of
    from eqat_mm.commands.recipes import Recipe
    from eqat_mm.commands.taken import Taken, demo_recipe, recipe_taken, require_model_named

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
        "eqat COMMAND --help lists its options; --print_config shows their values."
    )


if __name__ == "__main__":
    sys.exit(main())
