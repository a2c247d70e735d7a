"""From what a user types after --model to the shape of a model, its sizes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eqat_mm.blocks.config import MOST_LAYERS, refused, require_layers
from eqat_mm.commands.plumbing.models import model_folder, require_model
from eqat_mm.plan.models import shipped_config
from eqat_mm.plan.shape import ModelShape, shape_of_config
from eqat_mm.runtime.files import read_json_object
from llava_adapters.registry import arch_of_config


def model_shape(model: str, adapter: str | None = None) -> ModelShape:
    """Return the shape of the model that a user names, by its configuration alone.

    Raises:
        EqatError: no configuration of it is shipped or to be had, or no adapter fits it.
    """
    return shape_of(*configuration_of(model), adapter)


def configuration_of(model: str) -> tuple[dict[str, Any], Path]:
    """Return the config.json of the model that a user names, and its path; a shipped one has none that is there."""
    config = None if Path(model).exists() else shipped_config(model)
    if config is not None:
        return config, Path(f"{model}.json")
    path = _config_file(model)
    return read_json_object(path), path


def shape_of(config: dict[str, Any], path: Path, adapter: str | None) -> ModelShape:
    """Return the shape of the model that a config.json describes.

    Raises:
        EqatError: more layers than any model has, no adapter, or a configuration that makes no model.
    """
    require_layers(config, path, MOST_LAYERS)
    arch = arch_of_config(config, path, adapter)
    with refused(path, "configuration"):
        return shape_of_config(config, arch)


def _config_file(model: str) -> Path:
    if Path(model).is_file():
        return Path(model)
    folder = model_folder(model, files=["config.json"])
    require_model(folder)
    return folder / "config.json"
