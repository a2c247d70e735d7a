"""LLaVA's published instruction data: what is said where a recipe names them and they are not there."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from eqat_mm.data.image_text.settings import Conversations
from eqat_mm.errors import DataError

_REPOSITORIES = {
    "llava_v1_5_mix665k.json": "liuhaotian/LLaVA-Instruct-150K",
    "blip_laion_cc_sbu_558k.json": "liuhaotian/LLaVA-Pretrain",
}
"""Published instruction data and the repository it is in."""


def require_instructions(config: Conversations) -> None:
    """Check that LLaVA's instruction data and images are there, where they are named; other data is read as it is.

    Raises:
        DataError: one of them is missing.
    """
    file = Path(os.path.expanduser(config.source))
    if file.name not in _REPOSITORIES:
        return
    if not file.is_file():
        fetch = ["hf", "download", _REPOSITORIES[file.name], file.name]
        raise DataError(
            where=f"--conversations.source {config.source}",
            given="no such file",
            allowed="LLaVA's instruction data, or your own in its format",
            do=f"{shlex.join([*fetch, '--repo-type', 'dataset', '--local-dir', str(file.parent)])}, or name another",
        )
    if config.image_folder is not None and not config.image_folder.is_dir():
        raise DataError(
            where=f"--conversations.image_folder {config.image_folder}",
            given="no such folder",
            allowed=f"the folder that image paths in {file.name} are relative to",
            do="fetch the images with the commands in docs/llava.md, or name the folder where they are",
        )
