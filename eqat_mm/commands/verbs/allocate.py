"""`eqat allocate`: bits for each linear of a model, so that it is damaged least within a budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from eqat_eval.perplexity import evaluate_perplexity
from eqat_eval.reference import ReferenceOutputs
from eqat_mm.blocks.source import OpenModel
from eqat_mm.checkpoint.folders import load_for_inference, load_tokenizer
from eqat_mm.commands.plumbing.runs import model_fingerprint, noted, require_single_process, settings
from eqat_mm.commands.verbs.quantize import open_full_precision
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.data.text.windows import digest_of, text_windows
from eqat_mm.errors import CheckpointError, ConfigError
from eqat_mm.quant.budget import Choice, best_choices
from eqat_mm.quant.spec import GroupSize, QuantSpec, WeightBits
from eqat_mm.runtime.device import best_device
from eqat_mm.runtime.files import read_json, write_json
from eqat_mm.runtime.precision import autocast, frozen_dtype, resolve
from eqat_mm.runtime.progress import quietly, say
from eqat_mm.runtime.room import require_writable
from eqat_mm.runtime.settings import Count, Filled, Positive, Seed, Settings
from eqat_mm.train.block_ap import check_groups
from eqat_mm.train.damage import Damages, Rounding, damage_by_gradient, damage_by_kl
from eqat_mm.train.units import Unit, units_of


@dataclass(frozen=True)
class AllocateJob(Settings):
    """Choose the bits of each linear: the least damage within a budget. The file is for `--quant.allocation`.

    Attributes:
        model: model folder, alias (`eqat assets`) or hub repository.
        average_bits: the budget, in stored bits per quantized weight, with step sizes and zero points: 2 bits in groups
            of 64 are 2.28, 3 are 3.30.
        output: JSON file. Default: runs/MODEL-wBITSgGROUP.json; runs with it are called the same.
        widths: bits to choose from, [2, 3, 4].
        group_size: weights that share a step size, in the runs with this allocation.
        symmetric: whether these are on the symmetric grid.
        measure: damage of a unit rounded alone: `kl` measures it, one forward for each unit and width; `gradient`
            follows from the actual error and one backward for each window.
        rounding: to the grid with the least error (search), from which training goes further, or to that of `eqat rtn`.
        calibration: text that damage is measured on.
        batch_size: windows per forward.
        seed: of the tokens that the model draws, with `gradient`.
        adapter: name of the architecture, where config.json does not decide it.
        device: what to compute on: cpu, cuda, cuda:N, or auto.
        overwrite: measure again, and replace an output that says something else.
    """

    model: str
    average_bits: Positive = field(kw_only=True)
    output: Path | None = None
    widths: Annotated[tuple[WeightBits, ...], Filled()] = (2, 3, 4)
    group_size: GroupSize = 64
    symmetric: bool = False
    measure: Literal["kl", "gradient"] = "kl"
    rounding: Rounding = "search"
    calibration: TextWindows = field(default_factory=lambda: TextWindows(length=512, count=8))
    batch_size: Count = 4
    seed: Seed = 0
    adapter: str | None = None
    device: str = "auto"
    overwrite: bool = False

    @property
    def specs(self) -> list[QuantSpec]:
        """Of each width, the fewest bits first."""
        return [QuantSpec(bits, self.group_size, self.symmetric) for bits in sorted(set(self.widths))]


def allocate(job: AllocateJob) -> Path:
    """Measure, choose and write; return the file.

    Raises:
        EqatError: any bad input, or a budget below the fewest bits, before anything is measured.
    """
    require_single_process("allocate")
    job.calibration.require_source("--calibration.source")
    opened = open_full_precision(job.model, job.adapter)
    units = units_of(opened)
    costs = _costs(job, opened, units)
    weights = sum(_linear(opened.blocks, unit, path).weight.numel() for unit in units for path in unit.paths)
    budget = _budget(job, costs, weights)
    output = job.output or _default_output(job)
    _require_file(output)
    windows = text_windows(load_tokenizer(opened.folder), job.calibration)
    damages = _damages(job, opened, units, windows, output.parent)
    choices = [[Choice(*pair) for pair in zip(*both, strict=True)] for both in zip(costs, damages, strict=True)]
    picks = best_choices(choices, budget)
    table = {name: job.specs[pick].bits for unit, pick in zip(units, picks, strict=True) for name in unit.names}
    spent = sum(unit[pick].cost for unit, pick in zip(choices, picks, strict=True)) / weights
    _write(job, output, {"average_bits": round(spent, 4), "bits": table})
    _report(job, choices, picks, weights)
    say(f"allocation: {output}\nnext: eqat block-ap --model {job.model} --quant.allocation {output}")
    return output


def _default_output(job: AllocateJob) -> Path:
    groups = job.specs[0].name.partition("g")[2]
    return Path("runs") / f"{Path(job.model).name}-w{job.average_bits:g}g{groups}.json"


def _require_file(output: Path) -> None:
    """Check that the output can be written.

    Raises:
        ConfigError: it is a folder.
        ResourceError: there is no place for it.
    """
    if output.is_dir():
        raise ConfigError(f"--output {output}", "a folder", "a file", f"name one in it: --output {output}/mixed.json")
    require_writable(output.parent)


def _linear(blocks: nn.ModuleList, unit: Unit, path: str) -> nn.Linear:
    linear = blocks[unit.block].get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear


def _costs(job: AllocateJob, opened: OpenModel, units: Sequence[Unit]) -> list[list[int]]:
    """Return the stored bits of each unit in each width."""
    check_groups(opened, job.specs[0])
    sizes = [[_linear(opened.blocks, unit, path).weight.shape for path in unit.paths] for unit in units]
    return [
        [sum(round(rows * columns * spec.bits_per_weight(columns)) for rows, columns in unit) for spec in job.specs]
        for unit in sizes
    ]


def _budget(job: AllocateJob, costs: Sequence[Sequence[int]], weights: int) -> int:
    """Return the budget in bits.

    Raises:
        ConfigError: the fewest are more.
    """
    ends = [sum(map(end, costs)) / weights for end in (min, max)]
    budget = round(job.average_bits * weights)
    if budget < sum(map(min, costs)):
        raise ConfigError(
            where=f"--average_bits {job.average_bits}",
            given="less than all linears take in the fewest bits",
            allowed=f"{ends[0]:.4f} (all {job.specs[0].bits} bits) to {ends[1]:.4f} (all {job.specs[-1].bits} bits): "
            "step sizes and zero points count",
            do="raise it, or add fewer bits to --widths",
        )
    return budget


def _damages(job: AllocateJob, opened: OpenModel, units: Sequence[Unit], windows: Tensor, folder: Path) -> Damages:
    """Return the damage of each unit in each width, that of an earlier start where it was measured alike."""
    decides = {name: settings(job)[name] for name in ("group_size", "symmetric", "measure", "rounding", "seed")}
    decides |= {"widths": [spec.bits for spec in job.specs]}
    decides |= {"model": model_fingerprint(opened.folder), "data": digest_of(windows)}

    def make() -> dict[str, Any]:
        damages = _measured(job, opened, units, windows)
        if not all(math.isfinite(damage) for unit in damages for damage in unit):
            given, allowed = "gradients that are not finite", "finite predictions of the full-precision model"
            raise CheckpointError(str(opened.folder), given, allowed, "try --measure kl, or other text")
        return {"damage": damages}

    note = folder / f"{Path(job.model).name}-damage"
    found: Damages = noted(note, "allocate", decides, make, anew=job.overwrite)["damage"]
    return found


def _measured(job: AllocateJob, opened: OpenModel, units: Sequence[Unit], windows: Tensor) -> Damages:
    device = best_device(job.device)
    precision = resolve("auto", device)
    model = load_for_inference(opened.folder, device, frozen_dtype(precision, device))
    blocks = opened.arch.find_blocks(model)
    linears = [[_linear(blocks, unit, path) for path in unit.paths] for unit in units]
    windows = windows.to(device)
    if job.measure == "gradient":
        return damage_by_gradient(model, linears, job.specs, job.rounding, windows, precision, job.seed)
    with autocast(precision, device), quietly():
        reference = ReferenceOutputs.record(model, windows, job.batch_size)

    def divergence() -> float:
        with autocast(precision, device), quietly():
            found = evaluate_perplexity(model, windows, batch_size=job.batch_size, reference=reference).kl
        assert found is not None
        return found

    return damage_by_kl(linears, job.specs, job.rounding, divergence)


def _write(job: AllocateJob, output: Path, content: dict[str, Any]) -> None:
    """Write the file.

    Raises:
        ConfigError: there is one already that says something else.
    """
    if output.exists() and not job.overwrite and _content(output) != content:
        raise ConfigError(
            where=f"--output {output}",
            given="a file that is there and says something else",
            allowed="a new file, or --overwrite",
            do="choose another --output; what was measured is kept",
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, content)


def _content(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError, RecursionError):
        return None


def _report(job: AllocateJob, choices: Sequence[Sequence[Choice]], picks: Sequence[int], weights: int) -> None:
    """Say what is expected of the choices, and of the same bits everywhere."""
    ways = {f"all {spec.bits} bits": [number] * len(choices) for number, spec in enumerate(job.specs)}
    held = Counter(job.specs[pick].bits for pick in picks)
    named = ", ".join(f"{held[bits]} at {bits}" for bits in sorted(held))
    for name, way in (ways | {f"chosen: {named}": list(picks)}).items():
        chosen = [unit[pick] for unit, pick in zip(choices, way, strict=True)]
        bits, damage = sum(one.cost for one in chosen) / weights, sum(one.damage for one in chosen)
        say(f"{bits:.2f} bits per weight, sum of damages {damage:.4g} nats per token ({name})")
