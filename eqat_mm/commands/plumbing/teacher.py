"""Who says what E2E-QP's student is to predict: the full-precision model in memory, or a file of its hidden states."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from eqat_mm.commands.line.model_config import sees
from eqat_mm.commands.plumbing.models import load_model, model_folder
from eqat_mm.commands.plumbing.runs import model_fingerprint
from eqat_mm.commands.plumbing.samples import Samples
from eqat_mm.commands.plumbing.shapes import model_shape
from eqat_mm.errors import ConfigError
from eqat_mm.plan.amounts import size
from eqat_mm.plan.e2e_qp import keeps_teacher
from eqat_mm.plan.end_to_end import text_work
from eqat_mm.plan.machine import this_machine
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.device import processes
from eqat_mm.runtime.precision import frozen_dtype, resolve
from eqat_mm.runtime.progress import say
from eqat_mm.train.kept_teacher import is_kept, keep_hidden_states


def require_cacheable(job: Any, base: Path, zero_stage: int) -> None:
    """Check that a teacher's hidden states can be kept, where a job asks for it.

    Args:
        job: of E2E-QP, with its data decided.
        base: packed checkpoint that it starts from.
        zero_stage: of DeepSpeed.

    Raises:
        ConfigError: it learns no predictions, or of images, or no process has the whole head.
    """
    if job.teacher != "cache":
        return
    given = None
    if job.loss != "kl":
        given = f"--loss {job.loss}, for which there is no teacher"
    elif job.conversations is not None or sees(str(base), job.model):
        given = "conversations, or a model that sees"
    elif zero_stage == 3:
        given = "ZeRO-3, which leaves no process the whole head"
    if given is not None:
        raise ConfigError(
            where="--teacher cache",
            given=given,
            allowed="--loss kl on text, of a language model, without ZeRO-3",
            do="leave --teacher out, or take memory",
        )


def kept_or_in_memory(job: Any, base: Path, samples: Samples, folder: Path, device: torch.device) -> str:
    """Return `cache` or `memory`, as `auto` of a job means here."""
    if job.conversations is not None:
        return "memory"
    work = text_work(*samples.dataset.windows.shape)
    machine = this_machine(device, folder, processes())
    return "cache" if keeps_teacher(model_shape(str(base)), QuantSpec(), job, work, machine) else "memory"


def in_memory(job: Any, arguments: transformers.TrainingArguments) -> transformers.PreTrainedModel:
    """Return the full-precision model."""
    kept = frozen_dtype(resolve(job.precision, arguments.device), arguments.device)
    return load_model(model_folder(job.model), arguments.device, kept)


def hidden_states_of(job: Any, samples: Samples, arguments: transformers.TrainingArguments, folder: Path) -> Path:
    """Return the file of the teacher's hidden states, beside the run folder; the first process makes it."""
    windows: Tensor = samples.dataset.windows
    precision = resolve(job.precision, arguments.device)
    decides = (model_fingerprint(model_folder(job.model)), samples.digest, precision)
    path = folder.absolute().parent / f"teacher-{hashlib.sha256(repr(decides).encode()).hexdigest()[:16]}.bin"
    hidden_size = model_shape(job.model).hidden
    with arguments.main_process_first(local=False):
        if not is_kept(path, windows, hidden_size):
            made = folder / "trainer" / path.name  # what a kill leaves there goes with the run
            keep_hidden_states(in_memory(job, arguments), windows, made, job.batch_size, precision)
            made.replace(path)
            say(f"the teacher's hidden states are kept in {path}, {size(path.stat().st_size)}")
    return path
