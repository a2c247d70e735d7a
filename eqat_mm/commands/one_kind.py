"""What E2E-QP is trained on: conversations about images or text, one of them and never the other in silence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from eqat_mm.commands.model_config import config_of
from eqat_mm.errors import ConfigError

if TYPE_CHECKING:
    from eqat_mm.commands.tune import E2EQPJob


def with_one_kind_of_data(job: E2EQPJob, base: Path) -> E2EQPJob:
    """Return the job without conversations where it is to be trained on text alone.

    Args:
        job: as it is asked for.
        base: the packed model, which need not be there yet.

    Raises:
        ConfigError: both kinds are named, or neither, or text for a model that sees.
    """
    if job.text_only:
        job = replace(job, conversations=None)
    elif job.conversations is None and _sees(job.model, base):
        raise ConfigError(
            where="--conversations.source",
            given=f"none, for {job.model}, a vision-language model",
            allowed="conversations about images, in LLaVA's format",
            do="add --conversations.source FILE --conversations.image_folder FOLDER, or --text_only to train on text",
        )
    if job.conversations is not None and job.data.source is not None:
        raise ConfigError(
            where="--data.source and --conversations.source",
            given=f"{job.data.source} and {job.conversations.source}",
            allowed="one of them: E2E-QP trains on text or on conversations",
            do="leave --data.source out, or add --text_only to train on text alone",
        )
    if job.conversations is None:
        job.data.require_source("--data.source")
    return job


def _sees(model: str, base: Path) -> bool:
    config = config_of(str(base)) or config_of(model) or {}
    return "vision_config" in config
