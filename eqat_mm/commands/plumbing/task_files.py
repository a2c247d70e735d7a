"""`eqat eval --task_file`: zero-shot multiple choice out of a file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eqat_eval.multiple_choice import Item, likelihoods, read_items, summary
from eqat_mm.checkpoint.folders import load_tokenizer
from eqat_mm.commands.plumbing.models import load_model
from eqat_mm.runtime.precision import Precision
from eqat_mm.runtime.progress import duration
from eqat_mm.runtime.ranks import Ranks


@dataclass(frozen=True)
class Asking:
    """How models are asked.

    Attributes:
        batch_size: texts per forward.
        device: to compute on.
        dtype: of what is not quantized.
        ranks: processes that divide the questions.
    """

    batch_size: int
    device: torch.device
    dtype: Precision | torch.dtype
    ranks: Ranks


def evaluate_task_file(
    folder: Path, reference: Path | None, path: Path, limit: int | None, asking: Asking
) -> dict[str, Any]:
    """Return what `eqat eval` says of a model and a file of questions.

    Args:
        folder: of the model.
        reference: of the full-precision model, which is asked the same; None for none.
        path: of the file.
        limit: questions to ask, the first ones; None for all.
        asking: how.

    Raises:
        DataError: the file is not of the form.
        CheckpointError: the predictions of a model are not finite.
    """
    items = read_items(path, limit)
    started = time.perf_counter()
    found = [_asked(each, items, asking) for each in _present(folder, reference)]
    figures = summary(items, *found).as_dict()
    return {"task_file": {"file": str(path), **figures}, "seconds": time.perf_counter() - started}


def task_file_line(found: dict[str, Any]) -> str:
    """Return one line for the user about one result."""
    row = found["task_file"]
    text = f"{row['file']}: accuracy {row['accuracy']:.1%}, per character {row['accuracy_norm']:.1%}"
    text += f", margin {row['margin']:.3f}"
    if row["flips"] is not None:
        text += f" (reference: accuracy {row['reference_accuracy']:.1%})"
        text += f", flips {row['flips']:.1%}, change of the margin {row['margin_change']:.3f}"
    return f"{text} on {row['questions']:,} questions ({duration(found['seconds'])})"


def _present(*folders: Path | None) -> Iterator[Path]:
    return (folder for folder in folders if folder is not None)


def _asked(folder: Path, items: list[Item], asking: Asking) -> list[list[float]]:
    own = [items[at] for at in asking.ranks.share(len(items))]
    model = load_model(folder, asking.device, asking.dtype)
    return asking.ranks.all_of(likelihoods(model, load_tokenizer(folder), own, asking.batch_size))
