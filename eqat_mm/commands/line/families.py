"""Families of models and the settings that were tuned for them: what a file of recipes says.

A file holds `about`, `models` (which models are of the family, by what their config.json says) and stages: settings of
a command by its name, or of a variant of it (`long-e2e-qp`). In the settings of a stage

- a mapping of bit widths, `{2: 2.0e-5, 3: 1.0e-5}`, stands for the value at the width that is asked for; the stage is
  there for the widths that all such mappings have;
- `like: FAMILY/STAGE` stands for the settings of that stage, beneath those beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from eqat_mm.runtime.plugins import plugged_folders

SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size")
LEFT_OUT: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "vocab_size": 32000},
    "mistral": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "vocab_size": 32000},
}
"""What a config.json means that leaves a size out, as published ones of LLaVA do: the defaults of its model type."""


@dataclass(frozen=True)
class Family:
    """A family of models with its stages.

    Attributes:
        name: of the family, and of its file.
        about: a sentence or two.
        models: which models are of it, as in the file.
        stages: settings by stage, as in the file.
    """

    name: str
    about: str
    models: Mapping[str, Any]
    stages: Mapping[str, Any]

    def size_of(self, config: Mapping[str, Any]) -> str | None:
        """Return the name of a model's size in this family, None where the model is not of it.

        Args:
            config: config.json of the model.
        """
        tower = config.get("text_config") or config
        if not isinstance(tower, Mapping) or config.get("model_type") != self.models["model_type"]:
            return None
        kind = str(tower.get("model_type", "llama"))
        sizes = LEFT_OUT.get(kind, {}) | {name: tower[name] for name in (*SIZES, "vocab_size") if name in tower}
        if kind not in self.models.get("towers", (kind,)) or not _few_enough(sizes, self.models.get("most_tokens")):
            return None
        found = [sizes.get(name) for name in SIZES]
        return next((name for name, size in self.models["sizes"].items() if size == found), None)

    def widths(self, stage: str) -> tuple[str, ...]:
        """Return the bit widths that a stage has settings for; none where they do not depend on the width."""
        given = [set(choice) for choice in _choices(merged(self.stages[stage]))]
        return tuple(map(str, sorted(set.intersection(*given)))) if given else ()

    def settings(
        self, stage: str, bits: str | None = None, group_size: int | None = None, *, symmetric: bool = False
    ) -> dict[str, Any]:
        """Return the settings of a stage.

        Args:
            stage: one of the family's.
            bits: one of its widths; None where it has none.
            group_size: of the weights; None takes the stage's own.
            symmetric: on the symmetric grid; the rates are those of the other one.
        """
        settings: dict[str, Any] = _at(merged(self.stages[stage]), bits)
        for each in _with_spec(settings):
            spec = {"bits": int(bits or 2)} | ({} if group_size is None else {"group_size": group_size})
            each["quant"] = each["quant"] | spec | ({"symmetric": True} if symmetric else {})
        return settings


def _few_enough(sizes: Mapping[str, Any], most: int | None) -> bool:
    tokens = sizes.get("vocab_size")
    return most is None or (isinstance(tokens, int) and tokens <= most)


@cache
def families() -> dict[str, Family]:
    """Return the families by name."""
    shipped = Path(str(files("eqat_configs"))) / "recipes"
    paths = [path for folder in (*plugged_folders("recipes"), shipped) for path in folder.glob("*.yaml")]
    return {path.stem: _read(path) for path in sorted(paths, key=lambda path: path.name)}


def _read(path: Path) -> Family:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return Family(path.stem, content.pop("about"), content.pop("models"), content)


def merged(settings: Any) -> Any:
    """Return settings with those that they are `like`."""
    if not isinstance(settings, Mapping):
        return settings
    own = {name: merged(value) for name, value in settings.items() if name != "like"}
    if "like" not in settings:
        return own
    family, _, stage = settings["like"].partition("/")
    return over(merged(families()[family].stages[stage]), own)


def over(below: Any, above: Any) -> Any:
    """Return settings `above` in place of those `below` that have the same name."""
    if not isinstance(below, Mapping) or not isinstance(above, Mapping) or _is_choice(below) or _is_choice(above):
        return above
    return {**below, **{name: over(below.get(name), value) for name, value in above.items()}}


def _is_choice(settings: Mapping[Any, Any]) -> bool:
    return bool(settings) and all(isinstance(key, int) for key in settings)


def _choices(settings: Any) -> Iterator[Mapping[int, Any]]:
    if isinstance(settings, Mapping):
        if _is_choice(settings):
            yield settings
        else:
            for value in settings.values():
                yield from _choices(value)


def _at(settings: Any, bits: str | None) -> Any:
    """Return settings with the value of every choice at a width."""
    if not isinstance(settings, Mapping):
        return settings
    if _is_choice(settings):
        return settings[int(bits or 0)]
    return {name: _at(value, bits) for name, value in settings.items()}


def _with_spec(settings: Any) -> Iterator[dict[str, Any]]:
    """Yield the mappings that hold a spec of weights."""
    if isinstance(settings, dict):
        if "quant" in settings:
            yield settings
        for value in settings.values():
            yield from _with_spec(value)
