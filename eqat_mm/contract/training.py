"""One step of each trainer, and what is in the files behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eqat_mm.blocks.arch import Inputs
from eqat_mm.blocks.weights import WeightSource
from eqat_mm.checkpoint.read import load
from eqat_mm.contract.case import CPU, Case, NotHere
from eqat_mm.contract.structure import SEES
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.block_ap import BlockAPConfig, run_block_ap
from eqat_mm.train.e2e_qp import E2EQPConfig, run_e2e_qp, scale_parameters
from eqat_mm.train.end_to_end import WindowDataset, training_arguments
from eqat_mm.train.fit import FitConfig, norms_of
from eqat_mm.train.losses import cross_entropy, predictions_that_count
from eqat_mm.train.rtn import run_rtn

SPEC = QuantSpec(2, 32)
_RATE = 1e-2
_TRAINED = "a model that is trained like any other"


def block_ap(case: Case) -> None:
    """A step of Block-AP changes quantized linears and norms, and nothing else in the files."""
    texts = [batch for batch in case.batches if "pixel_values" not in batch]
    fit = FitConfig(epochs=1, validation_samples=0, batch_size=len(texts), lr_weight=_RATE, lr_norm=_RATE)
    opened = case.open()
    run_block_ap(
        opened,
        texts,
        BlockAPConfig(SPEC, fit=fit),
        case.folder / "block-ap",
        device=CPU,
        source="tiny",
        provenance={"config": {}},
    )
    left, norms, changed = _compared(case, case.folder / "block-ap/model")
    case.require(
        not changed - norms,
        f"{', '.join(sorted(changed - norms)[:3])} changed",
        "quantized linears and norms, the rest byte for byte",
        "look at what the module does to its parameters in a forward",
    )
    case.require(bool(left), "nothing left as it was", "embedding, head", "declare them under `full_precision`")


def e2e_qp(case: Case) -> None:
    """A step of E2E-QP reaches every step size, in a model that is in training."""
    model = _packed(case)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = E2EQPConfig(max_steps=1, batch_size=4, accumulation=1, save_steps=0, learning_rate=_RATE)
    windows = torch.cat([batch["input_ids"] for batch in case.batches if "pixel_values" not in batch])
    arguments = training_arguments(config, case.folder / "e2e-qp", CPU)
    run_e2e_qp(model, WindowDataset(windows[:4]), config, arguments, teacher=None)
    after = model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    other = sorted(name for name in changed if not name.endswith(".weight_scale"))
    case.require(not other, f"{', '.join(other[:3])} changed", "step sizes alone", _TRAINED)
    _require_gradients(case, model, {"input_ids": windows, "labels": windows}, "text")


def e2e_qp_on_images(case: Case) -> None:
    """A step on images and text reaches every step size, too."""
    if case.arch.auto_class != SEES:
        raise NotHere("a language model")
    for inputs in (batch for batch in case.batches if "pixel_values" in batch):
        _require_gradients(case, _packed(case), inputs | {"labels": inputs["input_ids"]}, "images and text")


def _require_gradients(case: Case, model: Any, batch: Inputs, what: str) -> None:
    """Check that a forward and a backward in training give every step size finite gradients."""
    model.train()
    model.zero_grad()
    columns, labels = predictions_that_count(batch["labels"])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, logits_to_keep=columns, use_cache=False).logits
    cross_entropy(logits, labels).backward()
    names = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    found = dict(zip(names, (scale.grad for scale in scale_parameters(model)), strict=True))
    without = [name for name, grad in found.items() if grad is None or not grad.isfinite().all()]
    case.require(
        not without,
        f"no finite gradient of {', '.join(without[:3])} ({len(without)} in all), on {what}",
        "gradients of all step sizes",
        "look at how the model uses this linear: a forward that calls it, or reads its `weight`, gives them",
    )


def _packed(case: Case) -> Any:
    """Return the tiny model, rounded to nearest."""
    folder = case.folder / f"rtn-{SPEC.name}"
    if not folder.exists():
        run_rtn(case.open(), SPEC, folder, source="tiny", provenance={})
    return load(folder / "model")


def _compared(case: Case, folder: Path) -> tuple[set[str], set[str], set[str]]:
    """Return what is as it was in the files of a checkpoint, what belongs to norms of blocks, and what is changed."""
    opened, written = case.open(), WeightSource(folder)
    norms = {
        opened.source.published_name(f"{opened.block_name(index)}.{path}.{leaf}")
        for index, block in enumerate(opened.blocks)
        for path, leaf in _leaves(block, norms_of(block))
    }
    before = {opened.source.published_name(name): opened.source.read(name) for name in opened.source.names()}
    both = [name for name in before if name in written]
    changed = {name for name in both if not same_bytes(before[name], written.read(name))}
    return set(both) - changed, norms, changed


def _leaves(block: nn.Module, modules: list[nn.Module]) -> list[tuple[str, str]]:
    wanted = {id(module) for module in modules}
    found = ((path, module) for path, module in block.named_modules() if id(module) in wanted)
    return [(path, name) for path, module in found for name, _ in module.named_parameters()]


def same_bytes(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors have one dtype, shape and contents, bit for bit."""
    as_bytes = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (left, right))
    return left.dtype is right.dtype and left.shape == right.shape and torch.equal(*as_bytes)
