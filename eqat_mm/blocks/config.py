"""What a model folder says of its model: config.json and generation_config.json, read by transformers, judged by us."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from eqat_mm.errors import CheckpointError, EqatError
from eqat_mm.runtime.files import read_json_object

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
_DESCRIPTIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
MOST_LAYERS = 2000
"""More in one stack than any model has; a number beyond it would be built for hours."""

_LAYERS = re.compile(r"(num|n)_(hidden_)?layers?")
_STACKED = re.compile(r"\w*(layers?|depth|experts)")


@contextmanager
def refused(path: Path, what: str, do: str = "mend the file, or download it again") -> Iterator[None]:
    """Turn whatever a library raises over a file of a model folder into four lines.

    What comes out of a library that is handed a broken file is an open set, so every exception is meant.

    Args:
        path: of the file or folder.
        what: a usable ... that it is not.
        do: what helps.

    Raises:
        CheckpointError: something was raised within.
    """
    try:
        yield
    except EqatError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            where=str(path),
            given=f"no usable {what} ({type(error).__name__}: {said})",
            allowed=f"{what} as transformers {transformers.__version__} reads it",
            do=do,
        ) from error


def read_config(folder: Path, most_layers: int = MOST_LAYERS) -> transformers.PreTrainedConfig:
    """Return the configuration of a model in full precision; an entry of a quantization that was undone is left out.

    Args:
        folder: of the model.
        most_layers: that a stack in it can have.

    Raises:
        CheckpointError: config.json is missing, broken or contradictory.
    """
    path = folder / CONFIG
    require_layers(read_json_object(path), path, most_layers)
    with refused(path, "configuration"):
        config: transformers.PreTrainedConfig = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for part in (config, config.get_text_config(decoder=True)):
            part.__dict__.pop("quantization_config", None)
    return config


def require_layers(config: dict[str, Any], path: Path, at_most: int) -> None:
    """Check that no stack of layers in a config.json is deeper than it can be, before a list of them is made.

    Raises:
        CheckpointError: one is.
    """
    parts = [config]
    while parts:
        for name, value in parts.pop().items():
            if isinstance(value, dict):
                parts.append(value)
            elif _number(value) > (at_most if _LAYERS.fullmatch(name) else MOST_LAYERS) and _STACKED.fullmatch(name):
                raise CheckpointError(
                    where=str(path),
                    given=f"{name}: {value}",
                    allowed=f"at most {MOST_LAYERS}, and no more layers than there are stored tensors",
                    do="mend the configuration, or download it again",
                )


def require_own_files(folder: Path) -> None:
    """Check that what lies beside the weights are files, and the folder's own: they are read, and go into checkpoints.

    Links into a cache of the hub are what its downloads are made of.

    Raises:
        CheckpointError: a pipe or a device, or a link that leads elsewhere.
    """
    for path in sorted(folder.glob("*")):
        if path.suffix not in _DESCRIPTIONS or path.is_dir():
            continue
        target = path.resolve()
        own = target.is_relative_to(folder.resolve()) or (
            target.parent.name == "blobs" and target.parents[1].name.startswith("models--")
        )
        if not own or not path.is_file():
            raise CheckpointError(
                where=str(path),
                given="no regular file" if own else f"a link to {target}",
                allowed="a file in the folder of the model",
                do="copy the file itself into the folder, or remove it",
            )


def read_generation_config(folder: Path) -> transformers.GenerationConfig | None:
    """Return the settings of generation in a model folder, None where there are none.

    Raises:
        CheckpointError: they are broken or contradictory.
    """
    path = folder / GENERATION_CONFIG
    if not path.exists():
        return None
    read_json_object(path)
    with refused(path, "settings of generation"):
        settings: transformers.GenerationConfig = transformers.GenerationConfig.from_pretrained(folder)
    return settings


def model_on_meta(config: transformers.PreTrainedConfig, auto_class: str, path: Path) -> transformers.PreTrainedModel:
    """Build a model with nothing in memory, not even what it computes itself.

    Args:
        config: of the model.
        auto_class: class of transformers that makes it.
        path: of config.json, for messages.

    Raises:
        CheckpointError: the configuration describes no model.
    """
    with refused(path, "configuration"), torch.device("meta"):
        model: transformers.PreTrainedModel = getattr(transformers, auto_class).from_config(config)
    return model


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else 0
