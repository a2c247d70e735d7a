"""Several tasks over one set of integers, switched in place: step sizes that E2E-QP trained, from small files.

from eqat_mm import adapters, load

model = load("runs/x/block-ap")
adapters.add(model, "shapes.safetensors")
adapters.add(model, "colours.safetensors")
adapters.switch(model, "colours")
model.generate(...)
adapters.switch(model, None)  # the base again
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from eqat_mm.checkpoint.step_sizes import (
    StepSizes,
    file_of,
    integers_of,
    origin_of,
    others_of,
    put,
    read_step_sizes,
    require_base,
    step_sizes_of,
    tensors_of,
)
from eqat_mm.errors import ConfigError
from llava_adapters import arch_for

_KEPT = "step_size_tasks"


@dataclass
class _Tasks:
    """What a model keeps of its tasks.

    Attributes:
        integers: hashes of its codes and zero points.
        others: hashes of everything else.
        base: what the model had in the places of the tasks' tensors before any of them.
        known: the tasks by name.
        active: the one that the model has now; None for the base.
    """

    integers: dict[str, str]
    others: dict[str, str]
    base: dict[str, Tensor] = field(default_factory=dict)
    known: dict[str, StepSizes] = field(default_factory=dict)
    active: str | None = None


def save(model: PreTrainedModel, path: str | Path, *, projector: bool = False) -> Path:
    """Write the present step sizes of a model as a task; return the file.

    Args:
        model: packed, as `load` and `tune` return it.
        path: a `.safetensors` file, or a folder for it.
        projector: of a vision-language model: it was trained, and belongs to the task.

    Raises:
        ConfigError: no packed model, no projector, or something else was trained as well.
        CheckpointError: the checkpoint that it was loaded from is gone.
    """
    return step_sizes_of(model, _projector_of(model) if projector else ()).write(Path(path))


def add(model: PreTrainedModel, path: str | Path, name: str | None = None) -> str:
    """Let a model know a task, which changes nothing yet; return its name.

    Args:
        model: packed; the base that the task was trained over, or any other task of that base.
        path: file or folder that `save` or `eqat adapter save` wrote.
        name: to switch to it by. Default: that of the file or folder.

    Raises:
        ConfigError: no packed model.
        CheckpointError: no such file, an altered one, or one that was trained over other integers.
    """
    tasks, task = _tasks_of(model), read_step_sizes(Path(path))
    require_base(task, tasks.integers, tasks.others, str(file_of(Path(path))))
    there = tensors_of(model)
    tasks.base |= {each: there[each].detach().clone() for each in task.tensors if each not in tasks.base}
    name = name or Path(path).stem
    tasks.known[name] = task
    return name


def switch(model: PreTrainedModel, name: str | None) -> None:
    """Give a model the step sizes of a task, in place; None gives back those of the base.

    What was trained since the last switch is lost unless it was saved.

    Raises:
        ConfigError: no packed model, or one that knows no such task.
    """
    tasks = _tasks_of(model)
    if name is not None and name not in tasks.known:
        near = get_close_matches(name, tasks.known, n=1)
        do = f"did you mean {near[0]}?" if near else "add it first: adapters.add(model, path)"
        raise ConfigError("adapters.switch", repr(name), ", ".join(tasks.known) or "None: no task was added", do)
    put(model, tasks.base | (tasks.known[name].tensors if name is not None else {}))
    tasks.active = name


def names(model: PreTrainedModel) -> list[str]:
    """Return the names of the tasks that a model knows."""
    return list(_tasks_of(model).known)


def active(model: PreTrainedModel) -> str | None:
    """Return the name of the task that a model has now; None for the base."""
    return _tasks_of(model).active


def _tasks_of(model: PreTrainedModel) -> _Tasks:
    origin_of(model)
    if _KEPT not in vars(model):
        vars(model)[_KEPT] = _Tasks(integers_of(model), others_of(model))
    tasks: _Tasks = vars(model)[_KEPT]
    return tasks


def _projector_of(model: PreTrainedModel) -> Iterable[str]:
    arch = arch_for(origin_of(model).manifest.arch, "the model: the adapter that made it")
    if arch.projector is None:
        raise ConfigError("projector", "True, of a language model", "False", "leave it out")
    return [arch.projector]
