"""Packed weights of random codes, step sizes and zero points, without a model around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from eqat_mm.checkpoint.source import PackedSource
from eqat_mm.export.form import Choices, Format
from eqat_mm.export.opened import PackedModel, PackedWeight
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec
from tests.export.foreign_layouts import Grid

OUT, IN = 64, 256


@dataclass(frozen=True)
class Made:
    """A weight with what it was made of: codes [O, I], step sizes and zero points of each input, [O, I]."""

    weight: PackedWeight
    codes: Tensor
    steps: Tensor
    zeros: Tensor


class _Source:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def made(spec: QuantSpec, rows: int = OUT, columns: int = IN, smallest: float = 0.01) -> Made:
    """Return a weight with codes and zero points of every value, and negative step sizes where they may be."""
    draw = torch.Generator().manual_seed(spec.bits)
    group = spec.group_of(columns, "it")
    codes = torch.randint(0, spec.top + 1, (rows, columns), generator=draw, dtype=torch.uint8)
    steps = smallest * (1 + torch.rand(rows, columns // group, generator=draw))
    zeros = torch.full_like(steps, spec.middle)
    if spec.symmetric:
        steps *= torch.where(torch.rand(steps.shape, generator=draw) < 0.5, -1, 1)
    else:
        zeros = torch.randint(0, spec.top + 1, steps.shape, generator=draw).float()
    state = PackedLinear.from_codes(codes, steps, zeros, None, spec).state_dict()
    state["weight_scale"] = state["weight_scale"].to(spec.storage_dtype)
    source = cast(PackedSource, _Source({f"it.{name}": value for name, value in state.items()}))
    wide = [each.double().repeat_interleave(group, 1) for each in (state["weight_scale"], zeros)]
    return Made(PackedWeight("it", spec, rows, columns, source), codes, *wide)


def arrays(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return tensors as numpy has them; it has no bfloat16, of which float32 holds every number."""
    return {
        name: (value.float() if value.dtype is torch.bfloat16 else value).numpy() for name, value in tensors.items()
    }


def assert_same_grid(grid: Grid, one: Made) -> None:
    """Assert that a format holds every code, step size and zero point."""
    assert np.array_equal(grid.codes, one.codes.numpy())
    assert np.array_equal(grid.steps, one.steps.numpy())
    assert np.array_equal(grid.zeros, one.zeros.numpy())


def assert_holds(folder: Path, model: PackedModel, form: Format, parts: Callable[[Path], Iterable[Any]]) -> None:
    """Assert that a folder holds every tensor of a model, by a reader of it, and is no larger than was said."""
    found = {part.name: part.values for part in parts(folder)}
    expected = {f"{name}.weight": weight.dense() for name, weight in model.weights.items()}
    expected |= {name: model.source.read(name).float() for name in model.others}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(found[name], value.numpy()), name
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert written <= 1.02 * form.size(model, Choices())
