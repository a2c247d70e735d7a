"""One voice: of several processes the first talks, and libraries say only what concerns the user."""

from __future__ import annotations

import logging
import os

from eqat_mm.runtime.progress import speaks

_LIBRARIES = ("DeepSpeed", "accelerate.accelerator", "torch.utils.cpp_extension", "torch.distributed")
_UNTRUE = "Gradient accumulation steps mismatch"
"""Said by accelerate of every run of the Trainer's under DeepSpeed, which accumulates as it was told."""


def quiet_libraries() -> None:
    """Let libraries warn in the first process alone, and show their bars there; errors are shown by all."""
    for name in _LIBRARIES:
        logging.getLogger(name).addFilter(_is_worth_saying)
    if not speaks():
        os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or (speaks() and _UNTRUE not in record.getMessage())
