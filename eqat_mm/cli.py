"""`eqat`: one command per job. Options come from the jobs' dataclasses, YAML recipes and flags, in that order."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from eqat_mm import __version__
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.ending import status_of, to_its_end
from eqat_mm.runtime.launcher import end_with_launcher
from eqat_mm.runtime.signals import stoppable

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


def _plan() -> tuple[type[Any], Callable[[Any], Any]]:
    from eqat_mm.commands.plan import PlanJob, plan

    return PlanJob, plan


COMMANDS: dict[str, _Command] = {
    "demo": _Command(
        "quantize SmolLM2-135M to 2 bits and print the ladder of stages", _demo, "smollm2-135m-w2g64-demo"
    ),
    "demo-vlm": _Command("the same for a small LLaVA, with questions about images, scored by lmms-eval", _demo_vlm),
    "plan": _Command("what a run will need: memory, disk, hours by phase", _plan, settings_of="block-ap"),
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
    "prepare-data": _Command("look through conversations once: what is wrong, how long, an index of it", _prepare_data),
    "assets": _Command("list or fetch the models and texts that work without a hub", _assets),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `eqat`; returns the exit status: 0, 2 for a user's error, 128 + N when stopped by signal N.

    Args:
        argv: the command and its arguments; None takes those of this process, which then ends with that status
            whenever a signal comes.
    """
    if argv is None:
        return to_its_end(lambda: main(sys.argv[1:]))
    arguments = list(argv)
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
    argv = [argument for argument in argv if not argument.startswith("--local_rank")]  # deepspeed adds it
    warnings.showwarning = _show_warning
    _print_anything()
    if "LOCAL_RANK" in os.environ:
        end_with_launcher()
    return status_of(lambda: _run(name, argv))


def _run(name: str, argv: Sequence[str]) -> None:
    if name not in COMMANDS:
        raise _unknown_command(name)
    job_class, function = COMMANDS[name].load()
    job = parse_job(name, job_class, argv)
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
        ConfigError: unknown option, or a value that is not allowed.
        SystemExit: after --help or --print_config.
    """
    from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]

    from eqat_mm.commands.options import parsed, spelled_out, with_ranges
    from eqat_mm.commands.recipes import recipe_path
    from eqat_mm.runtime.progress import say

    argv = spelled_out(name, job_class, argv)
    recipe = COMMANDS[name].recipe or _tuned_recipe(COMMANDS[name].settings_of or name, argv, job_class)
    parser = ArgumentParser(
        prog=f"eqat {name}",
        description=COMMANDS[name].help,
        exit_on_error=False,
        allow_abbrev=False,
        default_config_files=[] if recipe is None else [str(recipe_path(recipe))],
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file or name of a shipped recipe")
    parser.add_class_arguments(job_class)
    with_ranges(parser, job_class)
    job = parsed(parser, name, job_class, argv)
    if recipe is not None and COMMANDS[name].recipe is COMMANDS[name].settings_of is None:
        say(f"settings: recipe {recipe}")
    return job


def _unknown_command(name: str) -> ConfigError:
    near = get_close_matches(name, COMMANDS, n=1)
    do = f"did you mean {near[0]}?" if near else "choose one of these commands"
    return ConfigError(f"eqat {ascii(name)[1:-1]}", ascii(name), ", ".join(COMMANDS), do)


def _tuned_recipe(name: str, argv: Sequence[str], job_class: type[Any]) -> str | None:
    """Return the shipped recipe for the model and spec that flags name, where they name no settings themselves."""
    from eqat_mm.commands.recipes import fitting_recipe

    model = next((field.default for field in fields(job_class) if field.name == "model"), None)
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    bits, group_size = _flags_of_spec(job_class)
    default_bits = next((str(field.default) for field in fields(job_class) if field.name == "bits"), "2")
    defaults = {"--config": None, "--model": model, bits: default_bits, group_size: None}
    for flag, default in defaults.items():
        flags.add_argument(flag, nargs="?", default=default)  # a missing value is the real parser's to refuse
    known, _ = flags.parse_known_args(argv)
    if known.config or not known.model:
        return None
    named = vars(known)
    return fitting_recipe(name, known.model, named[bits.lstrip("-")], named[group_size.lstrip("-")])


def _flags_of_spec(job_class: type[Any]) -> tuple[str, str]:
    """Return the flags of bits and group size."""
    nested = any(field.name == "quant" for field in fields(job_class))
    return ("--quant.bits", "--quant.group_size") if nested else ("--bits", "--group_size")


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
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
