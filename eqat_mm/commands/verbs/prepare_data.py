"""`eqat prepare-data`: conversations are looked through once, before any run needs them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eqat_mm.checkpoint.speaker import load_listener
from eqat_mm.commands.plumbing.models import model_folder
from eqat_mm.data.image_text.index import Index
from eqat_mm.data.image_text.samples import prepare
from eqat_mm.data.image_text.settings import ImageTextData
from eqat_mm.runtime.progress import duration, say
from eqat_mm.runtime.settings import Settings

_PROCESSOR_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class PrepareDataJob(Settings):
    """Look through conversations about images, with the processor of a model.

    Attributes:
        model: whose processor counts tokens: model folder, alias or hub repository. Its weights are not needed.
        conversations: which, with the settings of the run that is to use them; `check: decode` reads every image once.
        problems: file in which bad samples are listed. Default: problems.jsonl beside the index.
    """

    model: str
    conversations: ImageTextData
    problems: Path | None = None


def prepare_data(job: PrepareDataJob) -> Path:
    """Make the index of a source, or look again for what was missing; return the file that it is in.

    Raises:
        EqatError: unreadable data, or a model without a processor; bad samples are counted and listed.
    """
    started = time.monotonic()
    processor = load_listener(model_folder(job.model, _PROCESSOR_FILES), job.conversations.style)
    index, path = prepare(processor, job.conversations, job.problems)
    say(f"{_facts(index)}; {duration(time.monotonic() - started)}")
    say(f"index: {path}")
    return path


def _facts(index: Index) -> str:
    counted = index.lengths[index.lengths > 0]
    tokens = f"{counted.mean():,.0f} tokens on average and {counted.max():,} at most" if len(counted) else "no tokens"
    texts = int(((index.shown == 0) & (index.kinds == 0)).sum())
    images = len(np.unique(index.images))
    return f"{len(index):,} records about {images:,} images, {texts:,} without one; {tokens}"
