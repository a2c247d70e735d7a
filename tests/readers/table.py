"""The table of docs/formats.md, from what the readers were seen to make of our folders."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
SEEN, PAGE = DOCS / "readers.json", DOCS / "formats.md"
BEGIN, END = "<!-- written by tests/readers/survey.py -->\n", "<!-- to here -->\n"

ABSENT = "not run here: "
"""Begins the reason of what nobody asked."""

EXACT = 1e-6
"""Nats per token: what two ways of computing the same float32 weights differ by."""


@dataclass(frozen=True)
class Seen:
    """What became of a case.

    Attributes:
        model: short name.
        spec: bits, groups and grid.
        reader: its name in the table.
        refused: the reason; None where it was read.
        kl: nats per token from our predictions to its own; None where an engine gives no logits.
        agreement: share of tokens with the same most likely one.
        perplexity: of its predictions.
        ours: of ours.
        written: tokens of a text of at most eight that it writes which we would write in their place, too.
        tokens: those of the text.
        apart: nats, the largest difference of log probabilities of these tokens; of an engine that tells them.
        reloaded: largest difference of logits after it saved and loaded the model, by the largest logit; negative where
            it could not save it, or not load what it saved.
    """

    model: str
    spec: str
    reader: str
    refused: str | None = None
    kl: float | None = None
    agreement: float | None = None
    perplexity: float | None = None
    ours: float | None = None
    written: int | None = None
    tokens: int | None = None
    apart: float | None = None
    reloaded: float | None = None

    @property
    def key(self) -> str:
        """Names the case."""
        return f"{self.model} {self.spec} {self.reader}"


def reason_in(lines: Sequence[str]) -> str:
    """Return the line of an error that says why, shortened."""
    errors = [place for place, line in enumerate(lines) if "Error" in line.split(":")[0] and " File" not in f" {line}"]
    first = errors[-1] if errors else max(len(lines) - 1, 0)
    return " ".join(
        " ".join(lines[first : first + 2 if lines[first:] and lines[first].endswith(":") else first + 1]).split()
    )[:160]


def read() -> list[Seen]:
    """Return all that was seen."""
    return [Seen(**each) for each in json.loads(SEEN.read_text(encoding="utf-8"))] if SEEN.is_file() else []


def keep(one: Seen) -> None:
    """Put what was seen of a case into both files, in place of what was seen of it before."""
    found = {each.key: each for each in (*read(), one)}
    rounded = [{name: _short(value) for name, value in asdict(each).items()} for each in found.values()]
    SEEN.write_text(json.dumps(rounded, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + text(read()) + END + after, encoding="utf-8")


def text(found: Iterable[Seen]) -> str:
    """Return the tables, one for each model, with the reasons of what is refused below each."""
    seen = list(found)
    models = dict.fromkeys(one.model for one in seen)
    return "\n".join(_of_model(model, [one for one in seen if one.model == model]) for model in models)


def _of_model(model: str, seen: list[Seen]) -> str:
    specs = sorted({one.spec for one in seen})
    reasons = list(dict.fromkeys(one.refused for one in seen if one.refused))
    rows = sorted({one.reader for one in seen}, key=str.lower)
    lines = [f"| {model} | {' | '.join(specs)} |", f"|---|{'---|' * len(specs)}"]
    for reader in rows:
        cells = {one.spec: cell(one, reasons) for one in seen if one.reader == reader}
        lines.append(f"| {reader} | {' | '.join(cells.get(spec, '') for spec in specs)} |")
    notes = [f"({number}) `{reason}`" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *(f"{note}  " for note in notes), ""])


def cell(one: Seen, reasons: Sequence[str] = ()) -> str:
    """Return what the table says of a case."""
    if one.refused is not None:
        number = f" ({reasons.index(one.refused) + 1})" if one.refused in reasons else ""
        return f"{'not run' if one.refused.startswith(ABSENT) else 'refused'}{number}"
    said = []
    if one.kl is not None:
        said.append("exact" if one.kl < EXACT else f"KL {one.kl:.0e}")
    elif one.perplexity is not None and one.ours:
        said.append(f"perplexity {one.perplexity / one.ours - 1:+.2%}")
    elif one.apart is not None:
        said.append(f"within {one.apart:.1g} nats")
    if one.written != one.tokens:
        said.append(f"{one.written} of {one.tokens} tokens")
    if one.reloaded is not None and not 0 <= one.reloaded < 1e-3:
        said.append("does not save and load it" if one.reloaded < 0 else "another one after saving")
    return ", ".join(said) or "the same text"


def _short(value: object) -> object:
    """Return a number to six digits; none where it is not finite."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
