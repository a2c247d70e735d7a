"""Shipped recipes: which there are, and for which models they were tuned. A name ends with its command."""

from __future__ import annotations

import difflib
import warnings
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

import yaml

from eqat_mm.errors import ConfigError
from eqat_mm.runtime.settings import shown


def recipes() -> dict[str, Path]:
    """Return the shipped recipes by name."""
    return _shipped("recipes", "*.yaml")


def recipe_path(name: str) -> Path:
    """Return the file of a recipe, given its path or the name of a shipped one.

    Raises:
        ConfigError: neither a file nor a shipped recipe.
    """
    return _file_named("--config", name, recipes(), "a YAML file, or a shipped recipe: ")


def deepspeed_path(name: str) -> Path:
    """Return DeepSpeed's settings, given their path or the name of shipped ones.

    Raises:
        ConfigError: neither a file nor shipped.
    """
    return _file_named("--deepspeed", name, _shipped("deepspeed", "*.json"), "a JSON file, or one of ")


def _shipped(folder: str, pattern: str) -> dict[str, Path]:
    return {path.stem: path for path in sorted((Path(str(files("eqat_configs"))) / folder).glob(pattern))}


def _file_named(option: str, name: str, shipped: dict[str, Path], allowed: str) -> Path:
    if name in shipped and not Path(name).is_file():
        return shipped[name]
    with suppress(OSError):  # a name too long for a file
        path = Path(name).expanduser()
        if path.is_file():
            return path
    near = difflib.get_close_matches(name, shipped, n=1)
    raise ConfigError(
        where=option,
        given=shown(name),
        allowed=allowed + ", ".join(shipped),
        do=f"did you mean {near[0]}?" if near else "check the path, or choose one of these",
    )


def fitting_recipe(command: str, model: str, bits: str, group_size: str | None = None) -> str | None:
    """Return the name of the shipped recipe of a command for this model and bits, None where there is none.

    Of several, the one with this group size, or with the smallest.
    """
    fitting: dict[int, str] = {}
    for name, path in recipes().items():
        if name.endswith(f"-{command}"):
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
            quant = settings.get("quant", settings)  # LLM-QAT names its bits, such as 4-8-4, at the top
            if model in (settings.get("recipe_for") or ()) and str(quant["bits"]) == bits:
                fitting.setdefault(quant.get("group_size", -1), name)
    groups = sorted(fitting, key=lambda group: (str(group) != group_size, group))
    return fitting[groups[0]] if groups else None


def warn_without_recipe(model: str, recipe_for: tuple[str, ...], command: str, bits: str = "2") -> None:
    """Warn when the settings were not tuned for this model: learning rates do not carry over between families."""
    if model in recipe_for:
        return
    fitting = fitting_recipe(command, model, bits)
    advice = f"use --config {fitting}" if fitting else "watch the loss and tune the learning rates"
    origin = f"tuned for {', '.join(recipe_for)}" if recipe_for else "the paper's, tuned for Llama-2 7B and up"
    warnings.warn(f"{command}: these settings are {origin}, not for {model}; {advice}", stacklevel=2)
