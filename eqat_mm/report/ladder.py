"""The ladder of stages: what evaluations have recorded of each, and what makes the record where there is none."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from eqat_mm.report.found import Found, Measured, Stage, number, table


@dataclass(frozen=True)
class Rung:
    """One row of the table.

    Attributes:
        title: of the stage.
        name: of its folder; empty for full precision.
        bits: stored bits per quantized weight; None for full precision.
        perplexity: on held-out text.
        kl: against full precision, nats per token.
        agreement: of the likeliest token with full precision.
        scores: of tasks, by their names.
        seconds: that the run took.
        text: beginning of the hash of what it was measured on.
        missing: command that makes the record; None where there is one.
    """

    title: str
    name: str
    bits: float | None = None
    perplexity: float | None = None
    kl: float | None = None
    agreement: float | None = None
    scores: tuple[tuple[str, float], ...] = ()
    seconds: float | None = None
    text: str | None = None
    missing: str | None = None


def rungs(found: Found, bits: dict[str, float | None]) -> list[Rung]:
    """Return the rows of the table, full precision first.

    Args:
        found: runs and evaluations.
        bits: stored bits per weight of each stage, by its name.
    """
    rows = [_rung("full precision", "", None, None, one) for one in _of_full_precision(found)]
    for stage in found.stages:
        seconds, own = stage.seconds, found.of(stage)
        rows += [_rung(stage.title, stage.name, bits.get(stage.name), seconds, one) for one in own]
        if not own:
            missing = evaluation_of(found, stage) if stage.finished else None
            title = stage.title if stage.finished else f"{stage.title}, not finished"
            rows.append(Rung(title, stage.name, bits.get(stage.name), seconds=seconds, missing=missing))
    return rows


def evaluation_of(found: Found, stage: Stage) -> str:
    """Return the command that measures a stage."""
    output = found.root / "eval" / f"{stage.name.replace('/', '-')}.json"
    words = ["eqat", "eval", "--model", str(stage.model), "--data.source", "TEXTS", "--output", str(output)]
    source = stage.manifest.source if stage.manifest else stage.setting("model")
    return shlex.join(words[:4] + (["--reference", str(source)] if source else []) + words[4:])


def _of_full_precision(found: Found) -> Iterator[Measured]:
    """Yield the evaluations of what the stages were made from, by its name or by its hash."""
    sources = {str(stage.manifest.source) for stage in found.stages if stage.manifest}
    sources |= {str(stage.setting("model")) for stage in found.stages}
    decides = [table(stage.record.get("decides")) for stage in found.stages]
    prints = {table(each.get("inputs")).get("model") for each in decides} - {None}
    for one in found.measured:
        if one.numbers.get("bits_per_weight") is None and (one.model in sources or one.fingerprint in prints):
            yield one


def _rung(title: str, name: str, bits: float | None, seconds: float | None, one: Measured) -> Rung:
    numbers = one.numbers
    perplexity, kl = number(numbers.get("perplexity")), number(numbers.get("kl"))
    agreement = number(numbers.get("top1_agreement"))
    text = one.text[:8] if isinstance(one.text, str) else None
    stored = number(numbers.get("bits_per_weight")) or bits
    return Rung(title, name, stored, perplexity, kl, agreement, tuple(_scores(numbers)), seconds, text)


def _scores(numbers: dict[str, object]) -> Iterator[tuple[str, float]]:
    accuracy = number(numbers.get("accuracy"))
    if accuracy is not None:
        yield "accuracy", accuracy
    for task, row in table(numbers.get("tasks")).items():
        score = number(table(row).get("accuracy"))
        if score is not None:
            yield task, score
