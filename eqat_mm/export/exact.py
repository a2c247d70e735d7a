"""What of a model a format would change: counted before anything is written, measured where it is allowed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eqat_eval.perplexity import PerplexityResult, ReferenceOutputs, evaluate_perplexity
from eqat_mm.blocks.arch import set_submodule
from eqat_mm.checkpoint.read import load
from eqat_mm.errors import ExportError
from eqat_mm.export.form import Format
from eqat_mm.export.opened import PackedModel
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.runtime.progress import progress


@dataclass(frozen=True)
class Change:
    """Weights that a format would hold with other values.

    Attributes:
        weights: how many; all of a group whose step size or offset changes.
        total: quantized weights of the model.
        tensors: linears with such weights.
    """

    weights: int
    total: int
    tensors: int

    @property
    def words(self) -> str:
        """Say how many."""
        share = self.weights / self.total
        return f"{self.weights:,} of {self.total:,} weights in {self.tensors} linears ({share:.3%})"


def change_of(model: PackedModel, form: Format) -> Change:
    """Count the weights that a format would change, by the step sizes and zero points of all groups."""
    changed = total = tensors = 0
    for weight in progress(model.weights.values(), what=f"compare with {form.name}", total=len(model.weights)):
        own = int(form.changed(weight).sum()) * weight.group_size
        changed, tensors = changed + own, tensors + bool(own)
        total += weight.out_features * weight.in_features
    return Change(changed, total, tensors)


def require_weights_alone(model: PackedModel, form: Format) -> None:
    """Check that a checkpoint is nothing but quantized weights: no format here holds more.

    Raises:
        ExportError: activations or the KV cache are quantized, too, or low-rank adapters lie beside the weights.
    """
    more = [] if model.weights_only else [f"activations or KV cache of {model.manifest.widths.name}"]
    more += ["low-rank adapters, which would take the weights off their grid"] if model.manifest.has_adapters else []
    if more:
        raise ExportError(
            where=f"--to {form.name}, from {model.folder}",
            given=f"a checkpoint with {' and '.join(more)}",
            allowed="one whose weights alone are quantized, as Block-AP, E2E-QP and rounding write it",
            do="export the checkpoint it was made from, or quantize weights alone",
        )


def require_exact(model: PackedModel, form: Format, change: Change, *, lossy: bool) -> None:
    """Check that a format holds all weights exactly, unless that is not asked for.

    Raises:
        ExportError: it does not.
    """
    if change.weights and not lossy:
        raise ExportError(
            where=f"--to {form.name}, from {model.folder}",
            given=f"{model.spec.name}, of which {change.words} would get other values",
            allowed=f"what {form.name} holds exactly: {form.nearest(model)}",
            do="quantize the model so, or add --lossy true, which measures what it costs",
        )


def measured_change(model: PackedModel, form: Format, windows: Tensor) -> PerplexityResult:
    """Return how far the predictions of a model as a format holds it are from those of the checkpoint.

    Weights are compared, in float32 on the CPU; what the engine rounds while it computes is not in it.

    Args:
        model: the checkpoint.
        form: the format.
        windows: token ids, int64 [n, T].
    """
    loaded = load(model.folder, dtype=torch.float32, verify=False)
    reference = ReferenceOutputs.record(loaded, windows, 1)
    for name in progress(model.weights, what=f"weights as {form.name} holds them", total=len(model.weights)):
        _replace(loaded, name, form.held(model.weights[name]))
    return evaluate_perplexity(loaded, windows, reference=reference)


def _replace(loaded: PreTrainedModel, name: str, held: Tensor) -> None:
    packed = loaded.get_submodule(name)
    assert isinstance(packed, PackedLinear), f"{name} is a {type(packed).__name__}"
    linear = nn.Linear(held.shape[1], held.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(held, requires_grad=False)
    if packed.bias is not None:
        linear.bias = nn.Parameter(packed.bias, requires_grad=False)
    set_submodule(loaded, name, linear)
