"""`eqat block-ap` and `eqat rtn`: a full-precision model in, a packed checkpoint out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from eqat_mm.blocks.source import OpenModel, open_model
from eqat_mm.checkpoint.companions import TOKENIZER, files_like
from eqat_mm.checkpoint.folders import load_tokenizer
from eqat_mm.checkpoint.speaker import restyled
from eqat_mm.commands.line.recipes import warn_without_recipe
from eqat_mm.commands.plumbing.calibration import ImageShare, calibration_of, modalities_of
from eqat_mm.commands.plumbing.models import model_folder, refuse_packed, require_finite, require_model
from eqat_mm.commands.plumbing.preflight import announce_block_ap, spool_on
from eqat_mm.commands.plumbing.runs import allocated, asked, default_output, opened_run, settings, settled
from eqat_mm.commands.plumbing.samples import problems_of
from eqat_mm.data.image_text.problems import say_late
from eqat_mm.data.image_text.settings import Conversations
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.errors import ConfigError
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.device import best_device
from eqat_mm.runtime.place import Place
from eqat_mm.runtime.precision import resolve
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.provenance import require_same_everywhere
from eqat_mm.runtime.ranks import Ranks, launched_ranks, own_device
from eqat_mm.runtime.reporting import reported, require_reporter
from eqat_mm.runtime.run import Run
from eqat_mm.runtime.settings import Settings
from eqat_mm.train.block_ap import BlockAPConfig, check_groups, check_room, run_block_ap
from eqat_mm.train.lanes import require_lanes
from eqat_mm.train.rtn import run_rtn
from llava_adapters import arch_of_folder


@dataclass(frozen=True)
class BlockAPJob(BlockAPConfig):
    """Block-AP of a model, in one process or in those of a launcher (torchrun -m eqat_mm block-ap).

    Attributes:
        model: model folder, alias (`eqat assets`) or hub repository.
        output: run folder; the checkpoint is `OUTPUT/model`. Default: runs/MODEL-SPEC/block-ap. On several machines, a
            folder that all of them see.
        calibration: text that the blocks are fitted on; its count is that of all samples.
        conversations: about images, of a vision-language model: some of the samples, in place of windows of text.
        image_share: share of conversations among the samples, where there are any; 1 takes no text.
        adapter: name of the architecture, where config.json does not decide it.
        device: what to compute on: cpu, cuda, cuda:N, or auto. Of several processes on GPUs each takes its own.
        overwrite: discard a run that is already in the output folder.
        recipe_for: models that these settings were tuned for (set by recipes).
    """

    model: str = field(kw_only=True)
    output: Path | None = None
    calibration: TextWindows = field(default_factory=lambda: TextWindows(count=4096))
    conversations: Conversations | None = None
    image_share: ImageShare = 0.5
    adapter: str | None = None
    device: str = "auto"
    overwrite: bool = False
    recipe_for: tuple[str, ...] = ()

    def check_together(self) -> None:
        """Check that there are tokens of two kinds, where they are to be told apart."""
        if self.conversations is None and self.token_weights != "equal":
            raise ConfigError(
                where=f"--token_weights {self.token_weights}",
                given="no conversations: all tokens are text",
                allowed="equal, or conversations about images beside the text",
                do="add --conversations.source FILE --conversations.image_folder FOLDER, or leave --token_weights out",
            )

    def require_data(self) -> None:
        """Check that what is read is named, before any work.

        Raises:
            ConfigError: it is not.
        """
        if self.conversations is None or self.image_share < 1:
            self.calibration.require_source("--calibration.source")


@dataclass(frozen=True)
class RTNJob(Settings):
    """Round-to-nearest of a model on min-max grids: no calibration, no training.

    Attributes:
        model: model folder, alias or hub repository.
        output: run folder; the checkpoint is `OUTPUT/model`. Default: runs/MODEL-SPEC/rtn.
        quant: bits, group size, symmetry.
        adapter: name of the architecture, where config.json does not decide it.
        overwrite: discard a checkpoint that is already in the output folder.
    """

    model: str
    output: Path | None = None
    quant: QuantSpec = field(default_factory=QuantSpec)
    adapter: str | None = None
    overwrite: bool = False


def block_ap(job: BlockAPJob) -> Path:
    """Run or continue Block-AP, alone or with the other processes of a launcher; return the folder of the checkpoint.

    Raises:
        EqatError: any bad input, before anything is written.
    """
    job.require_data()
    require_reporter(job.report_to)
    device = best_device(own_device(job.device))
    with launched_ranks(device) as ranks:
        return _block_ap(job, device, ranks)


def _block_ap(job: BlockAPJob, device: torch.device, ranks: Ranks) -> Path:
    require_same(ranks, settings(replace(job, device="auto")))
    fit, count = job.fit, job.calibration.count
    ranks.from_first(lambda: require_lanes(fit.batch_size, fit.lanes, count, ranks.world))
    opened = open_full_precision(job.model, job.adapter)
    if ranks.rank == 0:
        warn_without_recipe(job.model, job.recipe_for, "block-ap")
    quant = job.quant.resolved()
    check_groups(opened, quant)
    folder = job.output or default_output(job.model, job.quant) / "block-ap"
    place = Place.within(folder)
    found = calibration_of(opened.folder, job.calibration, job.conversations, job.image_share, folder)
    style = None if job.conversations is None else job.conversations.style
    restyled(opened.folder, style)  # what cannot be stored is found out now
    inputs: dict[str, Path | str] = {"model": opened.folder, "data": found.digest, **allocated(quant)}
    require_same(ranks, {name: given for name, given in inputs.items() if name != "model"})
    amounts = (found.work, device, folder)
    config = replace(job, quant=quant)
    job = ranks.from_first(lambda: _settled(job, place, device, lambda: spool_on(opened, config, *amounts)))
    config = replace(job, quant=quant)

    def prepare(run: Run) -> dict[str, Any]:
        verdict = announce_block_ap(opened, config, *amounts)
        check_room(opened, round(found.work.samples * found.work.mean), job, folder, device, ranks, run.written)
        return {"plan": verdict.phase.totals}

    wanted = asked("block-ap", job, device, inputs)
    with opened_run(place, wanted, prepare, overwrite=job.overwrite, from_first=ranks.from_first) as run:
        if not run.finished:
            options: dict[str, Any] = {"device": device, "source": job.model, "provenance": run.record, "ranks": ranks}
            options["style"] = style
            options["modalities"] = modalities_of(opened, found, job, folder, device, ranks)
            with reported(job.report_to, folder, settings(job)) as reporter:
                run_block_ap(opened, found.batches, config, folder, reporter=reporter, **options)
            ranks.from_first(run.finish)
            say_late(problems_of(folder))
            say(f"checkpoint: {folder / 'model'}")
    return folder / "model"


def require_same(ranks: Ranks, config: dict[str, Any]) -> None:
    """Check that all processes were started alike; the first says where not.

    Raises:
        ConfigError: they were not.
    """
    configs = ranks.gathered(config)
    ranks.from_first(lambda: require_same_everywhere(configs))


def _settled(job: BlockAPJob, place: Place, device: torch.device, spool: Callable[[], str]) -> BlockAPJob:
    """Return the job with every `auto` decided that decides the result, or where its streams are."""
    dtype = str(job.stream_dtype_on(device)).removeprefix("torch.")
    return settled(
        job, place, {"precision": lambda: resolve("auto", device), "stream_dtype": lambda: dtype, "spool": spool}
    )


def rtn(job: RTNJob) -> Path:
    """Round a model to nearest; return the folder of the checkpoint.

    Raises:
        EqatError: any bad input, before anything is written.
    """
    opened = open_full_precision(job.model, job.adapter)
    quant = job.quant.resolved()
    check_groups(opened, quant)
    if files_like(opened.folder, TOKENIZER):  # it goes into the checkpoint
        load_tokenizer(opened.folder)
    folder = job.output or default_output(job.model, job.quant) / "rtn"
    weights = sum(parameter.numel() for parameter in opened.model.parameters())

    def prepare(run: Run) -> dict[str, Any]:
        run.require_room(weights * 2, "checkpoint")
        return {}

    wanted = asked("rtn", job, torch.device("cpu"), {"model": opened.folder, **allocated(quant)})
    with opened_run(Place.within(folder), wanted, prepare, overwrite=job.overwrite) as run:
        if not run.finished:
            run_rtn(opened, quant, folder, source=job.model, provenance=run.record)
            run.finish()
            say(f"checkpoint: {folder / 'model'}")
    return folder / "model"


def open_full_precision(model: str, adapter: str | None) -> OpenModel:
    """Open the model that a user names, on the meta device.

    Raises:
        EqatError: there is none, no adapter fits it, it is quantized already, not whole or not finite.
    """
    folder = model_folder(model)
    require_model(folder)
    refuse_packed(model, folder)
    opened = open_model(folder, arch_of_folder(folder, adapter))
    require_finite(opened.source)
    return opened
