"""`eqat recipes`: which settings are shipped, and what they say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from eqat_mm.commands.line.families import families
from eqat_mm.commands.line.model_config import config_of
from eqat_mm.commands.line.recipes import Recipe, family_of, find_recipe, named_recipe, recipes_of, why
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.settings import Settings, shown


@dataclass(frozen=True)
class RecipesJob(Settings):
    """List the shipped recipes, or print some.

    Attributes:
        model: recipe to print, or model (folder, alias or hub repository) whose recipes to print; null lists all.
        bits: only recipes for this bit width of the weights, or these three of LLM-QAT.
    """

    model: str | None = None
    bits: str | None = None


def list_recipes(job: RecipesJob) -> None:
    """List or print.

    Raises:
        ConfigError: neither a recipe nor a model with recipes, or none for these bits.
    """
    if job.model is None:
        say(_overview())
        return
    found = [recipe for recipe in _recipes_of(job.model) if job.bits is None or job.bits == _bits(recipe)]
    if not found:
        raise ConfigError(
            where="--bits",
            given=shown(job.bits),
            allowed="a width that has recipes",
            do=f"see them with `eqat recipes {job.model}`",
        )
    for recipe in found:
        say(f"# {recipe.name}\n{yaml.safe_dump(dict(recipe.settings), sort_keys=False, width=120)}")


def _recipes_of(model: str) -> Iterator[Recipe]:
    recipe, config = named_recipe(model), config_of(model)
    if recipe is None and config is None:
        found = find_recipe(model, "eqat recipes")  # says what is near
        assert not isinstance(found, Recipe)
        raise ConfigError("eqat recipes", str(found), "a shipped recipe or a model", "read the file itself")
    if recipe is not None:
        yield recipe
        return
    assert config is not None
    family = family_of(config)
    if family is None:
        raise ConfigError(
            where=f"eqat recipes {model}",
            given=f"a {why(model)}, of no family that was tuned",
            allowed=", ".join(families()),
            do="train with the paper's settings, the defaults, and watch the loss",
        )
    yield from recipes_of(family)


def _bits(recipe: Recipe) -> str:
    quant = recipe.settings.get("quant") or {}
    return str(quant.get("bits", recipe.settings.get("bits")))


def _overview() -> str:
    rows = []
    for family in families().values():
        sizes = f"{family.models['model_type']}: {', '.join(family.models['sizes'])}"
        rows.append(f"{family.name}  ({sizes})\n  {' '.join(family.about.split())}")
        for stage in family.stages:
            names = [recipe.name for recipe in recipes_of(family) if recipe.stage == stage]
            rows.append(f"    {', '.join(names)}")
    return "\n".join(
        [
            *rows,
            "",
            "A command takes the recipe of its model and bits by itself and says so; --config NAME names one. A name",
            "may have another group size, or none: llava-1.5-w2g32-block-ap, llava-1.5-w2-block-ap.",
            "`eqat recipes NAME` or `eqat recipes MODEL --bits 3` prints what they say.",
        ]
    )
