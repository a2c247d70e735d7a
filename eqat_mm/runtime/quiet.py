"""One voice: of several processes the first talks, and libraries say only what concerns the user."""

from __future__ import annotations

import logging
import os
import time

from eqat_mm.runtime.progress import speaks

_LIBRARIES = ("DeepSpeed", "accelerate.accelerator", "torch.utils.cpp_extension", "torch.distributed")
_UNTRUE = "Gradient accumulation steps mismatch"
"""Said by accelerate of every run of the Trainer's under DeepSpeed, which accumulates as it was told."""
_UNTIL_ENDED = 30.0  # seconds in which a launcher ends the other processes


def quiet_libraries() -> None:
    """Let libraries warn in the first process alone, and show their bars there; errors are shown by all."""
    for name in _LIBRARIES:
        logging.getLogger(name).addFilter(_is_worth_saying)
    if not speaks():
        os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def leave_it_to_the_first() -> None:
    """Wait, where the first process of this machine finds the same error, until the launcher ends this one.

    Where it has not found it, this process is the one to say it, a little later.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_UNTIL_ENDED)


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or (speaks() and _UNTRUE not in record.getMessage())
