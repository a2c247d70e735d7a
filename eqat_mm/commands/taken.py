"""Which recipe a command takes for what a user typed, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eqat_mm.commands.outline import Option
from eqat_mm.commands.recipes import Recipe, fitting_recipe, named_recipe, why
from eqat_mm.commands.typed import Typed
from eqat_mm.errors import ConfigError


@dataclass(frozen=True)
class Taken:
    """What a command's settings begin with.

    Attributes:
        beneath: the recipe found for the model; None where there is none, or where one is named.
        line: what the user is told; empty where there is no recipe.
    """

    beneath: Recipe | None = None
    line: str = ""


def demo_recipe(command: str, name: str) -> Taken:
    """Return the recipe that a command of the demo begins with.

    Raises:
        ConfigError: the package that brings it is not installed.
    """
    found = named_recipe(name)
    if found is None:
        raise ConfigError(
            where=f"eqat {command}",
            given=f"no recipe {name}",
            allowed="an environment with the demo, a package of its own",
            do="install it: pip install ./demo in the checkout, or eqat-mm-demo",
        )
    return Taken(found)


def recipe_taken(command: str, options: Sequence[Option], typed: Typed) -> Taken:
    """Return the recipe that a command takes: one that is named, or that of its model, bits and group size.

    Args:
        command: whose recipes count.
        options: of it.
        typed: flags and files.
    """
    named = [each.name for each in typed.configs if isinstance(each, Recipe)]
    if named:
        return Taken(line=f"settings: recipe {', '.join(named)}, as --config says")
    model = typed.value("model")
    if not isinstance(model, str) or "\0" in model:
        return Taken()
    bits, group_size = _spec(options, typed)
    found = fitting_recipe(command, model, bits, group_size)
    return Taken() if found is None else Taken(found, f"settings: recipe {found.name}, for {why(model)}")


def _spec(options: Sequence[Option], typed: Typed) -> tuple[str, int | None]:
    """Return bits and group size, as far as they are given or have a default."""
    defaults = {option.name: option.default for option in options}
    under = "quant." if "quant.bits" in defaults else ""
    bits, group_size = typed.value(f"{under}bits"), str(typed.value(f"{under}group_size"))
    is_number = group_size.lstrip("-").isdecimal() and len(group_size) < 4
    return str(defaults.get(f"{under}bits", 2) if bits is None else bits), int(group_size) if is_number else None


def require_model_named(command: str, options: Sequence[Option], typed: Typed) -> None:
    """Check that a model is named, where the command needs one.

    Raises:
        ConfigError: it is not.
    """
    needs = any(option.name == "model" and option.required for option in options)
    if needs and "--print_config" not in typed.flags and typed.value("model") is None:
        raise ConfigError(
            where=f"eqat {command}",
            given="no model",
            allowed="a model folder, a hub repository, or an alias of `eqat assets`",
            do=f"name one: eqat {command} --model llava-1.5-7b; the demo's is smollm2-135m",
        )
