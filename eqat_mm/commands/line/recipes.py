"""Recipes: the shipped settings of a command for a model, found by what the model is, or by name.

A name is FAMILY-SPEC-STAGE: `llava-1.5-w2g64-block-ap`. SPEC is the bit width with or without a group size, with `sym`
on the symmetric grid (`w2g64sym`), or, in LLM-QAT, three widths; without it the stage is taken at 2 bits.
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from eqat_mm.commands.line.families import Family, families
from eqat_mm.commands.line.model_config import config_of
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.settings import shown

_SPEC = re.compile(r"w(?P<bits>\d)(?:g(?P<group>32|64|128|256|row))?(?P<symmetric>sym)?|(?P<widths>\d-\d+-\d+)")
_FEW = 8
"""Names that fit into a message, all of them."""


@dataclass(frozen=True)
class Recipe:
    """Settings for a command.

    Attributes:
        name: as `--config` takes it.
        stage: its last part.
        family: of the models that it was tuned for.
        settings: nested, without a model unless it is that of a demo.
    """

    name: str
    stage: str
    family: str
    settings: Mapping[str, Any]


def recipe_names() -> list[str]:
    """Return the names of all recipes, each with the group size it takes by itself."""
    return [recipe.name for family in families().values() for recipe in recipes_of(family)]


def recipes_of(family: Family) -> Iterator[Recipe]:
    """Yield the recipes of a family, each with the group size it takes by itself."""
    for stage in family.stages:
        yield from (_recipe(family, stage, bits) for bits in family.widths(stage) or (None,))


def _recipe(
    family: Family, stage: str, bits: str | None, group_size: int | None = None, *, symmetric: bool = False
) -> Recipe:
    settings = family.settings(stage, bits, group_size, symmetric=symmetric)
    tuned = {"recipe_for": [family.name]}
    if stage.endswith(("demo", "demo-vlm", "table")):  # of several commands, each with its model
        stages = {name: value for name, value in settings.items() if isinstance(value, dict) and "model" in value}
        settings |= {name: {**tuned, **value} for name, value in stages.items()}
    else:
        settings = {**tuned, **settings}
    spec = _spec_of(settings, bits)
    return Recipe("-".join([family.name, *spec, stage]), stage, family.name, settings)


def _spec_of(settings: Mapping[str, Any], bits: str | None) -> list[str]:
    """Return the part of a name that says widths and group size; empty where the stage has none."""
    quant = settings.get("quant") or (settings.get("block_ap") or {}).get("quant")
    if quant is not None:
        group = "row" if quant["group_size"] == -1 else quant["group_size"]
        return [f"w{bits}g{group}{'sym' if quant.get('symmetric') else ''}"]
    widths = settings.get("bits")
    return [widths] if isinstance(widths, str) else []


def named_recipe(name: str) -> Recipe | None:
    """Return the recipe of this name, None where there is none."""
    for family in families().values():
        stages = sorted((stage for stage in family.stages if name.endswith(f"-{stage}")), key=len, reverse=True)
        if stages and name.startswith(f"{family.name}-"):
            spec = name.removeprefix(f"{family.name}-").removesuffix(stages[0]).rstrip("-")
            if (found := _with_spec(family, stages[0], spec)) is not None:
                return found
    return None


def _with_spec(family: Family, stage: str, spec: str) -> Recipe | None:
    widths = family.widths(stage)
    if not spec:
        return _recipe(family, stage, widths[0] if widths else None)
    found = _SPEC.fullmatch(spec)
    if found is None or found["bits"] not in (widths or (None,)):
        return None
    group = {None: None, "row": -1}.get(found["group"], found["group"])
    size = None if group is None else int(group)
    recipe = _recipe(family, stage, found["bits"], size, symmetric=found["symmetric"] is not None)
    return None if found["widths"] not in (None, recipe.settings.get("bits")) else recipe


def recipe_for(command: str, config: Mapping[str, Any], bits: str, group_size: int | None = None) -> Recipe | None:
    """Return the recipe of a command for a model, None where there is none.

    Args:
        command: name of the command.
        config: config.json of the model.
        bits: width of the weights, in LLM-QAT three widths.
        group_size: of the weights; None takes the recipe's.
    """
    family = family_of(config)
    if family is None or command not in family.stages:
        return None
    widths = family.widths(command)
    if widths:
        return _recipe(family, command, bits, group_size) if bits in widths else None
    found = _recipe(family, command, None)
    return found if found.settings.get("bits") == bits else None


def family_of(config: Mapping[str, Any]) -> Family | None:
    """Return the family that a model is of, None where it is of none."""
    return next((family for family in families().values() if family.size_of(config) is not None), None)


def fitting_recipe(command: str, model: str, bits: str, group_size: int | None = None) -> Recipe | None:
    """Return the recipe of a command for the model that a user names; None where there is none, or no such model."""
    config = config_of(model)
    return None if config is None else recipe_for(command, config, bits, group_size)


def why(model: str) -> str:
    """Say what a model is by its config.json: `llava with a llama tower, 4096 x 32: llava-1.5 7b`."""
    config = config_of(model) or {}
    family, tower = family_of(config), config.get("text_config") or config
    kind, inner = config.get("model_type"), tower.get("model_type", "llama")
    what = f"{kind}" if tower is config else f"{kind} with a {inner} tower"
    return f"{what}: {family.name}, {family.size_of(config)}" if family else what


def find_recipe(name: str, option: str = "--config") -> Recipe | Path:
    """Return the recipe that an option names, or the file.

    Raises:
        ConfigError: neither a file nor a recipe.
    """
    found = None if os.path.isfile(name) else named_recipe(name)
    if found is not None:
        return found
    return _file_named(option, name, recipe_names(), "a YAML file, or a recipe of `eqat recipes`: ")


def deepspeed_path(name: str) -> Path:
    """Return DeepSpeed's settings, given their path or the name of shipped ones.

    Raises:
        ConfigError: neither a file nor shipped.
    """
    folder = Path(str(files("eqat_configs"))) / "deepspeed"
    shipped = sorted(path.stem for path in folder.glob("*.json"))
    if name in shipped and not Path(name).is_file():
        return folder / f"{name}.json"
    return _file_named("--deepspeed", name, shipped, "a JSON file, or one of ")


def _file_named(option: str, name: str, shipped: list[str], allowed: str) -> Path:
    with suppress(OSError):  # a name too long for a file
        path = Path(os.path.expanduser(name))  # pathlib's raises where there is no such user
        if path.is_file():
            return path
    near = difflib.get_close_matches(name, shipped, n=3)
    raise ConfigError(
        where=option,
        given=shown(name),
        allowed=allowed + ", ".join(near if near and len(shipped) > _FEW else shipped),
        do=f"did you mean {near[0]}?" if near else "check the path, or choose one of these",
    )


def warn_without_recipe(model: str, recipe_for: tuple[str, ...], command: str, bits: str = "2") -> None:
    """Warn when the settings were not tuned for this model: learning rates do not carry over between families."""
    family = None if model in recipe_for else family_of(config_of(model) or {})
    if model in recipe_for or (family is not None and family.name in recipe_for):
        return
    fitting = fitting_recipe(command, model, bits)
    advice = f"use --config {fitting.name}" if fitting else "watch the loss and tune the learning rates"
    origin = f"tuned for {', '.join(recipe_for)}" if recipe_for else "the paper's, tuned for Llama-2 7B and up"
    warnings.warn(f"{command}: these settings are {origin}, not for {model}; {advice}", stacklevel=2)
