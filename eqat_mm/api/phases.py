"""`quantize`, `tune`, `plan_for`: Block-AP, E2E-QP and the plan, from Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel

from eqat_mm.api.asked import Text, common, job_from, require_no_processor, said, sources_of
from eqat_mm.api.in_memory import (
    configuration_of,
    is_packed_model,
    name_of,
    packed_folder,
    require_full_precision,
    require_model,
    written,
)
from eqat_mm.checkpoint.folders import is_packed
from eqat_mm.checkpoint.manifest import checkpoint_folder, read_manifest
from eqat_mm.checkpoint.read import load
from eqat_mm.commands.line.model_config import config_of
from eqat_mm.commands.plumbing.runs import default_output
from eqat_mm.commands.plumbing.shapes import model_shape
from eqat_mm.commands.verbs.plan import PlanJob, plan
from eqat_mm.commands.verbs.quantize import BlockAPJob, block_ap
from eqat_mm.commands.verbs.tune import E2EQPJob, e2e_qp, stage_of
from eqat_mm.errors import ConfigError
from eqat_mm.plan.verdict import Verdict
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.device import best_device
from eqat_mm.runtime.place import RECORD
from eqat_mm.runtime.ranks import own_device


def quantize(
    model: str | Path | PreTrainedModel,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    text: Text | None = None,
    conversations: str | Path | None = None,
    images: str | Path | None = None,
    output: str | Path | None = None,
    processor: Any = None,
    config: str | Path | None = None,
    device: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> PreTrainedModel:
    """Quantize a model with Block-AP, or go on with that: what `eqat block-ap` does, in the same run folder.

    Settings that are not given are those of the recipe for this model, bits and group size, else the defaults.

    Args:
        model: alias, hub repository, folder, or a transformers model in full precision. A model in memory is first
            written to `OUTPUT/source` in the dtypes that it has; another model in its place is another run.
        bits: of a weight: 2, 3, 4 or 8.
        group_size: weights that share a step size: 32, 64, 128, 256, or -1 for a row.
        text: what the blocks are fitted on.
        conversations: about images, in LLaVA's format, of a vision-language model: half of the samples, or the share
            that `image_share` says.
        images: folder that the image paths in them are relative to.
        output: run folder; the checkpoint is `OUTPUT/model`. Default: runs/MODEL-SPEC/block-ap.
        processor: of a model in memory: its processor or tokenizer. Default: that of its `name_or_path`.
        config: recipe, or YAML file with settings.
        device: what to compute on: cpu, cuda, cuda:N, or auto.
        overwrite: discard a run that is already in the output folder.
        quiet: print nothing.
        settings: other settings by the names of the options: `{"fit.epochs": 4}` or `{"fit": {"epochs": 4}}`.
        **more: the same, `seed=1` or `**{"fit.epochs": 4}`.

    Returns:
        The packed model, as `load` returns it, on the device of the job.

    Raises:
        EqatError: any bad input, before anything expensive.
    """
    named = {"quant.bits": bits, "quant.group_size": group_size, "calibration.source": sources_of(text)}
    named |= {"conversations.source": conversations, "conversations.image_folder": images}
    named |= common(output, config, device, overwrite)
    with said(unless=quiet):
        if isinstance(model, str | Path):
            require_no_processor(processor)
            job = job_from("block-ap", BlockAPJob, named | {"model": model}, settings, more)
        else:
            job = _of_memory(model, processor, named, settings, more)
        return _loaded(block_ap(job), job.device)


def tune(
    model: str | Path | PreTrainedModel,
    *,
    conversations: str | Path | None = None,
    images: str | Path | None = None,
    text: Text | None = None,
    train_projector: bool | None = None,
    output: str | Path | None = None,
    source: str | Path | None = None,
    config: str | Path | None = None,
    device: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> PreTrainedModel:
    """Tune a packed model end to end with E2E-QP, or go on with that: what `eqat e2e-qp` does, in the same run folder.

    Args:
        model: as `quantize` and `load` return it, or its folder or run folder; or the name of the full-precision model
            whose Block-AP run is where `quantize` puts it by default. A packed model that was changed in memory, such
            as by a Trainer of your own, is first written to `OUTPUT/start`.
        conversations: about images, in LLaVA's format; for a vision-language model.
        images: folder that the image paths in them are relative to.
        text: to train on, for a language model; a vision-language model needs `text_only=True` for that.
        train_projector: of a vision-language model, beside the step sizes.
        output: run folder; the checkpoint is `OUTPUT/model`. Default: `e2e-qp` beside the run folder `block-ap` of the
            model; for a run folder X of your own X-e2e-qp.
        source: the full-precision model. Default: what the checkpoint says that it was made from.
        config: recipe, or YAML file with settings.
        device: what to compute on: cpu, cuda, cuda:N, or auto.
        overwrite: discard a run that is already in the output folder.
        quiet: print nothing.
        settings: other settings by the names of the options, as for `quantize`.
        **more: the same.

    Returns:
        The tuned model, packed, on the device of the job.

    Raises:
        EqatError: any bad input, before anything expensive.
    """
    named = {
        "conversations.source": conversations,
        "conversations.image_folder": images,
        "data.source": sources_of(text),
    }
    named |= {"train_projector": train_projector} | common(output, config, device, overwrite)
    with said(unless=quiet):
        base = _base_of(model)
        if base is None:
            job = job_from("e2e-qp", E2EQPJob, named | {"model": source or model}, settings, more)
        else:
            job = _of_packed(model, base, source, named, settings, more)
        return _loaded(e2e_qp(job), job.device)


def plan_for(
    model: str | Path | PreTrainedModel,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    gpu: str | None = None,
    quiet: bool = False,
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> list[Verdict]:
    """Say what quantizing a model will need: what `eqat plan` prints. Nothing of a shipped model is downloaded.

    Args:
        model: alias, hub repository, folder, config.json, or a transformers model.
        bits: of a weight.
        group_size: weights that share a step size.
        gpu: 3090, 4090, 5090, l40s, a100, h100, h200 or cpu. Default: what this machine has.
        quiet: print nothing.
        settings: other settings of `eqat plan` by name.
        **more: the same.

    Returns:
        One for each phase: bytes on each GPU, in RAM and on the disk, seconds, and whether it fits.

    Raises:
        EqatError: an unknown model or card, or settings that do not fit the model.
    """
    named = {"quant.bits": bits, "quant.group_size": group_size, "gpu": gpu}
    with said(unless=quiet):
        if isinstance(model, str | Path):
            return plan(job_from("plan", PlanJob, named | {"model": model}, settings, more, recipes_of="block-ap"))
        require_model(model)
        with configuration_of(model) as folder:
            return plan(job_from("plan", PlanJob, named | {"model": folder}, settings, more, recipes_of="block-ap"))


def _of_memory(
    model: PreTrainedModel, processor: Any, named: Mapping[str, Any], *settings: Mapping[str, Any] | None
) -> BlockAPJob:
    """Return the job of Block-AP on a model in memory, which is written once the job is known to make sense."""
    require_full_precision(model)
    with configuration_of(model) as folder:
        job = job_from("block-ap", BlockAPJob, {**named, "model": folder}, *settings)
        job.require_data()
        model_shape(folder, job.adapter)
    output = job.output or default_output(name_of(model), job.quant) / "block-ap"
    source = written(model, output / "source", processor, overwrite=job.overwrite)
    return replace(job, model=str(source.absolute()), output=output)


def _base_of(model: Any) -> Path | None:
    """Return the folder of a packed model; None for the name of a full-precision one.

    Raises:
        ConfigError: a model in memory that is not packed.
    """
    if is_packed_model(model):
        return Path(model.checkpoint_origin.folder)
    if not isinstance(model, str | Path):
        given = f"a {type(model).__name__}, not as `load` returns it"
        raise ConfigError("model", given, "a packed model", "quantize it first: tune(quantize(model, ...), ...)")
    folder = checkpoint_folder(Path(model).expanduser())
    return folder if is_packed(folder) else None


def _of_packed(
    model: Any,
    base: Path,
    source: str | Path | None,
    named: Mapping[str, Any],
    *settings: Mapping[str, Any] | None,
) -> E2EQPJob:
    """Return the job of E2E-QP on a packed model, whose settings are those of the model that it was made from."""
    manifest = model.checkpoint_origin.manifest if is_packed_model(model) else read_manifest(base)
    full = str(source or manifest.source)
    spec = QuantSpec(**manifest.spec)
    alike = replace(spec, allocation=None).as_dict()  # e2e-qp is given the checkpoint itself
    named = {f"quant.{name}": value for name, value in alike.items()} | dict(named) | {"quantized": base}
    there = full if config_of(full) is not None else str(base)  # which says as well what the model is
    job = replace(job_from("e2e-qp", E2EQPJob, named | {"model": there}, *settings), model=full)
    stage = stage_of(job)
    output = job.output or _beside(base, stage) or default_output(full, spec) / stage
    start = packed_folder(model, output / "start", overwrite=job.overwrite) if is_packed_model(model) else base
    return replace(job, quantized=start, output=output)


def _beside(base: Path, stage: str) -> Path | None:
    """Return the run folder of a stage that follows on the run that made a checkpoint; None where no run did."""
    run = base.parent
    if base.name != "model" or not (run / RECORD).is_file():
        return None
    return run.with_name(stage if run.name in ("block-ap", "rtn") else f"{run.name}-{stage}")


def _loaded(folder: Path, device: str) -> PreTrainedModel:
    """Return what a job has made, in each process of a launcher, once the first has written it."""
    if dist.is_initialized():
        dist.barrier()
    return load(folder, device=best_device(own_device(device)))
