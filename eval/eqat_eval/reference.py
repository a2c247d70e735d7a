"""What the full-precision model said, recorded once and compared with as many models as one likes.

Logits of n windows would take n*T*V numbers, and V is 32 to 64 times the hidden size H. The output
head is a single matrix product, so its input [n, T, H] and one copy of its weight [V, H] say the
same, and the logits of a few rows are rebuilt when they are needed:

    logits_RV = hidden_RH @ weight_VH^T + bias_V        (in the model's own dtype, as the model does)

Some models do more after the head: Gemma-2 soft-caps its logits, Cohere and Granite scale them. That
is found by looking, not by a list of names: the product is compared with the logits of the first
batch, and where they differ the logits themselves are kept in float16.

Shape suffixes: N windows, T tokens per window, B windows of a batch, R rows (positions) of a chunk,
H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from eqat_eval.finite import not_finite, predicts
from eqat_eval.inference import inference
from eqat_eval.windows import check_positive, check_windows, row_spans
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.progress import progress, say

_PROBE_ROWS = 128


@dataclass(frozen=True, eq=False)
class Head:
    """A copy of a model's output head: `weight_VH` [V, H] and `bias_V` [V] or None, in the model's dtype."""

    weight_VH: Tensor
    bias_V: Tensor | None

    def __call__(self, hidden_RH: Tensor) -> Tensor:
        """Return logits [R, V] in the head's dtype."""
        return functional.linear(hidden_RH, self.weight_VH, self.bias_V)

    def to(self, device: torch.device) -> Head:
        """Return this head on `device` (no copy if it is there already)."""
        return Head(self.weight_VH.to(device), None if self.bias_V is None else self.bias_V.to(device))


@dataclass(frozen=True, eq=False)
class ReferenceOutputs:
    """Outputs of a reference model on fixed windows; made by `record`.

    Attributes:
        windows_NT: the token ids they belong to, int64 [n, T], on the CPU.
        cached: on the CPU; with a `head` its inputs, [n, T, H] in the model's dtype, otherwise the
            logits, [n, T, V] float16: their rounding (relative 2^-11) then is a noise floor under
            every KL, so a model compared with itself gives about 1e-7 to 1e-5 nats and not 0.
        head: the output head, or None where the logits are not simply its output.
    """

    windows_NT: Tensor
    cached: Tensor
    head: Head | None

    @classmethod
    def record(cls, model: PreTrainedModel, windows_NT: Tensor, batch_size: int = 1) -> ReferenceOutputs:
        """Run `model` once over the windows and keep what rebuilds its logits.

        The head is copied, so the model may be quantized in place or freed afterwards. The first
        batch runs twice: once to see whether head(hidden) equals the model's logits.

        Args:
            model: the full-precision causal LM.
            windows_NT: token ids, int64 [n, T].
            batch_size: windows per forward pass.

        Raises:
            DataError: windows of a wrong dtype or shape, or ids outside the vocabulary.
            ConfigError: `batch_size` below 1.
            CheckpointError: the model's predictions are not finite.
        """
        check_windows(windows_NT, model)
        check_positive("batch_size", batch_size)
        with inference(model):
            head = _verified_head(model, windows_NT[:batch_size])
            cached = _record(model, windows_NT, batch_size, keep_hidden=head is not None)
        return cls(windows_NT.cpu().clone(), cached, None if head is None else head.to(torch.device("cpu")))

    def to(self, device: torch.device) -> ReferenceOutputs:
        """Return the same outputs with the head on `device`; the cache stays on the CPU."""
        head = None if self.head is None else self.head.to(device)
        return ReferenceOutputs(self.windows_NT, self.cached, head)

    def logits(self, window: int, start: int, stop: int, device: torch.device) -> Tensor:
        """Return the logits [stop - start, V] at positions start..stop of one window.

        The dtype is the head's, or float16 without a head. Call `to(device)` first, once.
        """
        rows = self.cached[window, start:stop].to(device)
        return rows if self.head is None else self.head(rows)

    def check_same_windows(self, windows_NT: Tensor) -> None:
        """Raise `ConfigError` unless these outputs were recorded on exactly `windows_NT`."""
        if torch.equal(self.windows_NT, windows_NT.cpu()):
            return
        raise ConfigError(
            where="reference",
            given=f"outputs on windows of shape {list(self.windows_NT.shape)}, evaluation on other tokens"
            f" of shape {list(windows_NT.shape)}",
            allowed="the same tokens, in the same order",
            do="call ReferenceOutputs.record on the windows you evaluate",
        )


def _verified_head(model: PreTrainedModel, batch_BT: Tensor) -> Head | None:
    """Return a copy of the model's output head if it alone explains the logits, otherwise None."""
    module = _head_module(model)
    if not isinstance(module, nn.Linear) or module.weight.is_meta:
        return None
    head = Head(module.weight.detach().clone(), None if module.bias is None else module.bias.detach().clone())
    hidden_BTH, logits_BTV = _run(model, batch_BT)
    return head if hidden_BTH is not None and _explains(head, hidden_BTH, logits_BTV) else None


def _head_module(model: Any) -> nn.Module:
    """Return the module that makes the logits; an empty one, which never runs, where there is none."""
    module: nn.Module | None = model.get_output_embeddings()
    return nn.Identity() if module is None else module


def _run(model: PreTrainedModel, batch_BT: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return (input of the output head, logits); the input is None unless the head ran exactly once."""
    seen: list[Tensor] = []
    hook = _head_module(model).register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[:1]))
    try:
        logits_BTV: Tensor = model(input_ids=batch_BT.to(model.device), use_cache=False).logits
    finally:
        hook.remove()
    complete = len(seen) == 1 and seen[0].shape[:-1] == logits_BTV.shape[:-1]
    return (seen[0] if complete else None), logits_BTV


def _explains(head: Head, hidden_BTH: Tensor, logits_BTV: Tensor) -> bool:
    """Tell whether head(hidden) is the logits, up to the rounding of their dtype (relative L2 error).

    Not `torch.equal`: a product over fewer rows may be summed in another order. Half an ulp of every
    element is allowed, a soft-cap or scale moves far more. NaN never compares equal: it falls back.
    """
    device = head.weight_VH.device  # a model spread over devices may hand its logits back on another one
    hidden_RH, logits_RV = hidden_BTH.flatten(0, 1).to(device), logits_BTV.flatten(0, 1).to(device)
    wrong = total = 0.0
    for start, stop in row_spans(len(hidden_RH), _PROBE_ROWS):
        expected = logits_RV[start:stop].float()
        wrong += float((head(hidden_RH[start:stop]).float() - expected).square().sum())
        total += float(expected.square().sum())
    tolerance = max(1e-5, 0.5 * torch.finfo(logits_BTV.dtype).eps)
    return wrong <= tolerance**2 * total


def _record(model: PreTrainedModel, windows_NT: Tensor, batch_size: int, *, keep_hidden: bool) -> Tensor:
    """Run the model over all windows; return the head's inputs [n, T, H] or float16 logits [n, T, V]."""
    cached: Tensor | None = None
    batches = torch.split(windows_NT, batch_size)
    for index, batch_BT in enumerate(progress(batches, what="reference", total=len(batches), unit="batch")):
        rows = _kept(model, batch_BT, keep_hidden, index * batch_size)
        if cached is None:
            cached = torch.empty((*windows_NT.shape, rows.shape[-1]), dtype=rows.dtype)
            if not keep_hidden:
                gib = cached.nbytes / 2**30
                say(f"reference: the output head alone does not give the logits; keeping them ({gib:.1f} GiB)")
        cached[index * batch_size : index * batch_size + len(batch_BT)] = rows
    assert cached is not None
    return cached


def _kept(model: PreTrainedModel, batch_BT: Tensor, keep_hidden: bool, window: int) -> Tensor:
    """Return what is kept of one batch, on the CPU; its logits are freed before the next batch runs."""
    hidden_BTH, logits_BTV = _run(model, batch_BT)
    compared_BTV = logits_BTV if keep_hidden else logits_BTV.half()
    if not predicts(compared_BTV):
        last = window + len(batch_BT) - 1
        raise not_finite(model, f"the reference's predictions in windows {window} to {last} are not finite")
    if not keep_hidden:
        return compared_BTV.cpu()
    assert hidden_BTH is not None, "the output head ran in the first batch but not in a later one"
    return hidden_BTH.cpu()
