"""Before expensive work: what it will need, in a line or two, and an error where that cannot be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

from eqat_mm.blocks.source import OpenModel
from eqat_mm.commands.plumbing.shapes import model_shape
from eqat_mm.data.image_text.settings import ImageTextData
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.errors import ResourceError
from eqat_mm.plan.end_to_end import CONVERSATIONS, Work, image_text_work, text_work
from eqat_mm.plan.judged import judged_block_ap, judged_e2e_qp, spool_for
from eqat_mm.plan.machine import this_machine
from eqat_mm.plan.models import shipped_config
from eqat_mm.plan.shape import ModelShape, shape_of
from eqat_mm.plan.table import one_line
from eqat_mm.plan.verdict import Verdict
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.progress import say
from eqat_mm.train.block_ap import BlockAPConfig
from eqat_mm.train.e2e_qp import E2EQPConfig


def announce_block_ap(
    opened: OpenModel, config: BlockAPConfig, work: Work, device: torch.device, folder: Path
) -> Verdict:
    """Say what Block-AP will need; return the same.

    Raises:
        ResourceError: it needs more RAM, GPU memory or disk than there is, by more than the figures may be wrong.
    """
    shape, machine = shape_of(opened.model, opened.arch), this_machine(device, folder)
    verdict = judged_block_ap(shape, config, work, machine)
    return announce(verdict, one_line(verdict.phase, machine))


def spool_on(
    opened: OpenModel, config: BlockAPConfig, work: Work, device: torch.device, folder: Path
) -> Literal["ram", "disk"]:
    """Return where Block-AP's streams are kept on this machine."""
    return spool_for(shape_of(opened.model, opened.arch), config, work, this_machine(device, folder))


def announce_e2e_qp(
    base: Path,
    model: str,
    spec: QuantSpec,
    config: E2EQPConfig,
    data: TextWindows | ImageTextData,
    device: torch.device,
    folder: Path,
) -> Verdict | None:
    """Say what E2E-QP will need, also where checkpoint or data are still missing; return the same.

    None where not even a configuration is at hand: what is missing is then asked for next.

    Raises:
        ResourceError: it needs more RAM, GPU memory or disk than there is, by more than the figures may be wrong.
    """
    shape = _shape_at_hand(base, model)
    if shape is None:
        return None
    machine = this_machine(device, folder, int(os.environ.get("WORLD_SIZE", "1")))
    verdict = judged_e2e_qp(shape, spec, config, work_of(shape, data), machine)
    return announce(verdict, one_line(verdict.phase, machine))


def announce(verdict: Verdict, line: str) -> Verdict:
    """Say the line, and what is short; return the verdict.

    Raises:
        ResourceError: more is short than the figures may be wrong by.
    """
    say(line)
    require_fits(verdict)
    if verdict.shortages:
        say(f"it may be too much: {'; '.join(map(str, verdict.shortages))}; {verdict.advice()}")
    return verdict


def require_fits(verdict: Verdict) -> None:
    """Check that a phase fits on its machine.

    Raises:
        ResourceError: more is short than the figures may be wrong by.
    """
    hopeless = [shortage for shortage in verdict.shortages if shortage.hopeless]
    if hopeless:
        raise ResourceError(
            where=f"{verdict.phase.name}, before it starts",
            given=f"{hopeless[0]}",
            allowed=f"what `eqat plan` says it needs: {hopeless[0].what} is short by more than it may be wrong by",
            do=verdict.advice(),
        )


def _shape_at_hand(base: Path, model: str) -> ModelShape | None:
    for folder in (base, Path(model)):
        if (folder / "config.json").is_file():
            return model_shape(str(folder))
    return None if shipped_config(model) is None else model_shape(model)


def work_of(shape: ModelShape, data: TextWindows | ImageTextData) -> Work:
    """Return what E2E-QP on some data has to do, as far as settings say it."""
    if isinstance(data, ImageTextData):
        return image_text_work(shape, data.count or CONVERSATIONS, data.max_length)
    return text_work(data.count or 4096, data.length)
