"""Letting DeepSpeed and accelerate forget, so that one test process can be many."""

from __future__ import annotations

import os

from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def forget_deepspeed() -> None:
    """Let what comes next begin as in a new process."""
    from deepspeed import comm
    from deepspeed.runtime import torch_autocast
    from deepspeed.utils import groups

    comm.comm.cdb = groups._WORLD_GROUP = None
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False


def forget_settings() -> None:
    """Let the settings of the last trainer be forgotten: notes in the environment, and how models are made."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    unset_hf_deepspeed_config()
