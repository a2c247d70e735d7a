"""What a job does differently where a launcher started several copies of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from eqat_mm.commands.recipes import deepspeed_path
from eqat_mm.errors import ConfigError


def deepspeed_settings(name: str | None) -> Path | None:
    """Return the file with DeepSpeed's settings, where a job names one and a launcher started this process.

    Raises:
        ConfigError: an unknown name, or DeepSpeed is not installed.
    """
    if name is None:
        return None
    path = deepspeed_path(name)
    if "LOCAL_RANK" not in os.environ:
        return None
    if find_spec("deepspeed") is None:
        raise ConfigError(
            where=f"--deepspeed {name}",
            given="DeepSpeed is not installed",
            allowed="an environment with it",
            do="pip install 'eqat-mm[deepspeed]', or leave --deepspeed out",
        )
    return path


@contextmanager
def whole_models(arguments: transformers.TrainingArguments) -> Iterator[None]:
    """Let transformers make whole models: under ZeRO-3 it scatters their parameters as soon as they exist."""
    config: Any = getattr(arguments, "hf_deepspeed_config", None)
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            set_hf_deepspeed_config(config)
