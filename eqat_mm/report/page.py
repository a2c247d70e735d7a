"""From what was found to one HTML file that needs no network: no script, no font, no picture but its own."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from eqat_mm.quant.spec import QuantSpec
from eqat_mm.report.charts import COLOURS, DASHES, chart
from eqat_mm.report.curves import block_panels, step_panels, totals
from eqat_mm.report.found import Found, Stage, table
from eqat_mm.report.grids import Linear, by_block, linears
from eqat_mm.report.ladder import rungs
from eqat_mm.report.planned import beside
from eqat_mm.report.storage import PARTS, Layer, bits_per_weight, layers_of
from eqat_mm.report.usage import Kind, kinds, panels
from eqat_mm.runtime.files import write_text
from eqat_mm.runtime.progress import duration, size

_END_TO_END = ("e2e-qp", "llm-qat")


@dataclass(frozen=True)
class Answers:
    """What several models answered to one question.

    Attributes:
        question: as it was asked.
        images: it is about, as `data:` addresses.
        answers: pairs of a model's title and what it wrote.
    """

    question: str
    images: tuple[str, ...]
    answers: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Section:
    """What the page says of one stage.

    Attributes:
        stage: it is of.
        key: of its lines in charts.
        layers: what its checkpoint stores.
        bits: per quantized weight.
        linears: how their grids are used.
    """

    stage: Stage
    key: int
    layers: list[Layer]
    bits: float | None
    linears: list[Linear]

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def kinds(self) -> list[Kind]:
        """How the grids of each kind of linear are used."""
        return kinds(self.linears)

    @property
    def columns(self) -> list[str]:
        """Kinds of linears that are in blocks."""
        return list(dict.fromkeys(one.kind for one in self.linears if one.block is not None))

    @property
    def heat(self) -> list[tuple[int, list[float | None]]]:
        """Share of weights at the ends of the codes: a row for each block, a value for each of `columns`."""
        ends = {
            (block, kind): sum(grids.ends)
            for kind in self.columns
            for block, grids in by_block([one for one in self.linears if one.kind == kind]).items()
        }
        blocks = sorted({block for block, _ in ends})
        return [(block, [ends.get((block, kind)) for kind in self.columns]) for block in blocks]

    @property
    def stored(self) -> list[int]:
        """Bytes of each of `PARTS`."""
        return [sum(layer.stored[place] for layer in self.layers) for place in range(len(PARTS))]


def write_report(found: Found, output: Path, answers: Sequence[Answers] | None = None) -> None:
    """Write the page.

    Args:
        found: what it is about.
        output: HTML file.
        answers: of the models to questions; None where none were asked.

    Raises:
        CheckpointError: a file of a checkpoint is missing or damaged.
    """
    parts = [_section(stage, key) for key, stage in enumerate(found.stages)]
    write_text(output, _environment().get_template("page.html.jinja").render(_context(found, parts, answers)))


def _section(stage: Stage, key: int) -> Section:
    if stage.manifest is None:
        return Section(stage, key, [], None, [])
    layers = layers_of(stage.model)
    spec = QuantSpec(**stage.manifest.spec)
    return Section(stage, key, layers, bits_per_weight(stage.model, layers), list(linears(stage.model, spec)))


def _context(found: Found, parts: list[Section], answers: Sequence[Answers] | None) -> dict[str, Any]:
    rows = rungs(found, {part.stage.name: part.bits for part in parts})
    last = next((part for part in reversed(parts) if part.layers), None)
    return {
        "found": found,
        "parts": parts,
        "last": last,
        "rungs": rows,
        "worst_kl": max((row.kl for row in rows if row.kl is not None), default=0.0),
        "texts": sorted({row.text for row in rows if row.text is not None}),
        "tasks": list(dict.fromkeys(name for row in rows for name, _ in row.scores)),
        "blocks": [_drawn(part, "blocks", block_panels(part.stage.metrics)) for part in parts if _is(part, "block-ap")],
        "curves": [_drawn(part, "steps", step_panels(part.stage.metrics)) for part in parts if _is(part, *_END_TO_END)],
        "usage": _usage(parts),
        "answers": answers,
        "seconds": sum(stage.seconds or 0.0 for stage in found.stages),
        "model": Path(_source_of(found)).name,
        "source": shlex.quote(_source_of(found)),
        "root": shlex.quote(str(found.root)),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": version("eqat-mm"),
        "style": Markup(_read("style.css")),
        "dashes": DASHES,
        "colours": COLOURS,
        "parts_of_bytes": PARTS,
    }


def _is(part: Section, *commands: str) -> bool:
    return part.stage.command in commands


def _drawn(part: Section, name: str, drawn: Any) -> dict[str, Any]:
    alt = {"blocks": "Loss and relative error of each block.", "steps": "Loss and learning rate along the steps."}[name]
    held_out = any("held_out_loss" in record for record in part.stage.metrics)
    svg = Markup(chart(f"{name}{part.key}", drawn, alt))
    return {"part": part, "chart": svg, "held_out": held_out, "totals": totals(part.stage)}


def _usage(parts: list[Section]) -> list[Markup]:
    alts = (
        "Along the blocks: share of weights at the ends of the codes, and of zero points at the ends of their range.",
        "Along the blocks: median step size with its spread, and information in a code.",
    )
    drawn = panels({part.key: part.linears for part in parts if part.linears})
    return [Markup(chart(f"usage{index}", each, alts[index])) for index, each in enumerate(drawn)]


def _source_of(found: Found) -> str:
    """Return the full-precision model as it was named."""
    named = [str(stage.manifest.source if stage.manifest else stage.setting("model") or "") for stage in found.stages]
    return named[-1] or "MODEL"


def _environment() -> jinja2.Environment:
    loader = jinja2.FunctionLoader(_read)
    made = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {"size": size, "duration": duration, "flat": flat, "share": share, "short": short}
    made.globals |= {"beside": beside, "table": table}
    return made


def _read(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Return nested settings as pairs of a dotted name and its value in words."""
    if not isinstance(value, dict):
        return [(prefix.removesuffix("."), "none" if value is None else str(value))]
    return [pair for name, inner in value.items() for pair in flat(inner, f"{prefix}{name}.")]


def share(value: float | None, digits: int = 1) -> str:
    """Return a share in percent; a dash for none."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def short(value: float | None, form: str = ",.2f") -> str:
    """Return a number in a format; a dash for none."""
    return "–" if value is None else format(value, form)
