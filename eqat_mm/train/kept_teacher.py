"""The full-precision model as a teacher that is not in memory: its last hidden states, in a file.

What follows them is the same in student and teacher: the head, which is not quantized, and what a model does to its
logits. So the student's own gives the teacher's predictions, from two bytes a channel and token. The file is made
once; runs of any width and seed that read the same windows share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from eqat_mm.runtime.files import atomic_path
from eqat_mm.runtime.precision import Decided, autocast
from eqat_mm.runtime.progress import progress

KEPT = torch.bfloat16
"""Of a kept hidden state: rounding moves predictions by less than 1e-4 nats."""


@torch.no_grad()
def keep_hidden_states(
    model: transformers.PreTrainedModel, windows: Tensor, path: Path, batch_size: int, precision: Decided
) -> None:
    """Write the last hidden states of a full-precision language model to a file, bfloat16 [n, T, H].

    Args:
        model: on its device.
        windows: int64 [n, T].
        path: of the file.
        batch_size: windows per forward.
        precision: of matrix products.
    """
    batches = windows.split(batch_size)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for batch in progress(batches, what="teacher", unit="batch"):
            with autocast(precision, model.device):
                output = model.base_model(input_ids=batch.to(model.device), use_cache=False)
            hidden_BTH = output.last_hidden_state.to("cpu", KEPT).contiguous()
            hidden_BTH.view(-1).view(torch.uint8).numpy().tofile(file)


def is_kept(path: Path, windows: Tensor, hidden_size: int) -> bool:
    """Whether a file holds hidden states of so many windows."""
    return path.is_file() and path.stat().st_size == windows.numel() * hidden_size * KEPT.itemsize


class KeptTeacher(nn.Module):
    """Predicts what the full-precision model predicts, for windows whose hidden states are kept.

    Args:
        student: whose head, and what follows it, are those of the full-precision model; no part of this module.
        windows: int64 [n, T], on which alone it can be asked.
        path: file that `keep_hidden_states` wrote of them.
    """

    student: Any

    def __init__(self, student: transformers.PreTrainedModel, windows: Tensor, path: Path) -> None:
        super().__init__()
        self.__dict__["student"] = student  # past nn.Module, which would take its parameters for the teacher's
        numbers = path.stat().st_size // KEPT.itemsize
        self.hidden_NTH = torch.from_file(str(path), size=numbers, dtype=KEPT).view(*windows.shape, -1)
        self.places = {_key(window): place for place, window in enumerate(windows)}

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        """Return what the student's head makes of the hidden states of some windows, int64 [B, T]."""
        places = [self.places[_key(window)] for window in input_ids.cpu()]
        head = self.student.get_output_embeddings().weight
        hidden_BTH = self.hidden_NTH[places].to(head.device, head.dtype)
        with _answering(self.student.base_model, MoeModelOutputWithPast(last_hidden_state=hidden_BTH)):
            return self.student(input_ids=input_ids, **options)


def _key(window: Tensor) -> bytes:
    return window.numpy().tobytes()


@contextmanager
def _answering(module: nn.Module, output: Any) -> Iterator[None]:
    """Let a module return `output` whatever it is given."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *args, **options: output
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own
