"""The table of `quality.py` as Markdown: rows beside each other, seeds as their mean, and what was answered."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from statistics import fmean
from typing import Any

from quality_rows import FULL_PRECISION, LENGTH, METHODS, ROUNDING, Row

NOT_RUN = "not run"
Found = dict[str, dict[str, Any]]
"""What is known of rows, by their keys."""


def gap_closed(perplexity: float, rounding: float, full: float) -> float:
    """Return the share of the gap in log-perplexity between rounding and full precision that a method closes."""
    return math.log(rounding / perplexity) / math.log(rounding / full)


def markdown(rows: Iterable[Row], found: Found, texts: list[str]) -> str:
    """Return the tables of all widths.

    Args:
        rows: that there are to be.
        found: those that there are.
        texts: columns; the first is the one that shares of the gap are of.
    """
    rows = list(rows)
    specs = dict.fromkeys(row.spec for row in rows if row.spec)
    return "\n".join(line for spec in specs for line in _section(spec, rows, found, texts))


def _section(spec: str, rows: list[Row], found: Found, texts: list[str]) -> Iterator[str]:
    yield f"## {spec}\n"
    first, *others = texts
    head = ["method", "windows", "seeds", "bits/weight", f"perplexity, {first}", "gap closed", "KL", "top-1", "flips"]
    head += [f"{text}: perplexity / KL" for text in others]
    head += ["repetition", "CPU minutes", "GB"]
    yield _line(head)
    yield _line(["---"] * len(head))
    for (method, windows), seeds in _grouped(rows, spec).items():
        done = [found[row.key] for row in seeds if "texts" in found.get(row.key, {})]
        label = [METHODS[method].title, str(windows) if windows else ""]
        if done:
            yield _line([*label, _of(done, seeds), *_figures(done, _ends(found, spec, first), texts)])
        else:
            said = "failed" if any("failed" in found.get(row.key, {}) for row in seeds) else NOT_RUN
            yield _line([*label, said, *[""] * (len(head) - 3)])
    yield ""


def _grouped(rows: list[Row], spec: str) -> dict[tuple[str, int], list[Row]]:
    """Return rows of a width, and full precision, by method and budget."""
    grouped: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row.spec in ("", spec):
            grouped.setdefault((row.method, row.windows), []).append(row)
    return grouped


def _of(done: list[dict[str, Any]], seeds: list[Row]) -> str:
    if not METHODS[seeds[0].method].draws:
        return ""
    return str(len(done)) if len(done) == len(seeds) else f"{len(done)} of {len(seeds)}"


def _ends(found: Found, spec: str, text: str) -> tuple[float, float] | None:
    """Return perplexities of rounding and of full precision, where both are known."""
    both = [found.get(key, {}).get("texts") for key in (Row(ROUNDING, spec).key, Row(FULL_PRECISION).key)]
    return None if None in both else tuple(each[text]["perplexity"] for each in both)  # type: ignore[index, return-value]


def _figures(done: list[dict[str, Any]], ends: tuple[float, float] | None, texts: list[str]) -> Iterator[str]:
    first, *others = texts
    stored = done[0]["bits_per_weight"]
    yield "" if stored is None else f"{stored:.2f}"
    judged = [row["texts"][first] for row in done]
    yield _mean([each["perplexity"] for each in judged], ".2f")
    yield "" if ends is None else _mean([gap_closed(each["perplexity"], *ends) for each in judged], ".1%")
    yield _mean([each["kl"] for each in judged], ".4f")
    yield _mean([each["top1_agreement"] for each in judged], ".1%")
    yield _mean([each["flips"] for each in judged], ".1%")
    for text in others:
        asked = [row["texts"][text] for row in done]
        yield f"{_mean([each['perplexity'] for each in asked], '.2f')} / {_mean([each['kl'] for each in asked], '.4f')}"
    repeated = [value for row in done if (value := row["generation"]["repeated_4grams"]) is not None]
    yield _mean(repeated, ".0%") if repeated else ""
    took = [row for row in done if "cpu_seconds" in row]
    more = "≥ " if any(row["stopped"] for row in took) else ""
    yield f"{more}{fmean(row['cpu_seconds'] for row in took) / 60:.1f}" if took else ""
    yield f"{max(row['peak_mib'] for row in took) / 1024:.1f}" if took else ""


def _mean(values: list[float], form: str) -> str:
    """Return the mean, and of several values how far the farthest is from it."""
    mean = fmean(values)
    form = f",{form}"
    spread = max(abs(value - mean) for value in values)
    return f"{mean:{form}}" if len(values) == 1 else f"{mean:{form}} ± {spread:{form}}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def answers(rows: Iterable[Row], found: Found) -> str:
    """Return what each model answered, question by question, as Markdown."""
    lines = ["# Answers\n", "Greedy, first tokens only.\n"]
    said = [(row.key, found[row.key]["generation"]) for row in rows if "generation" in found.get(row.key, {})]
    for prompt in dict.fromkeys(prompt for _, each in said for prompt in each["asked"]):
        lines.append(f"## {prompt}\n")
        for key, each in said:
            texts = dict(zip(each["asked"], each["texts"], strict=True))
            lines += [f"- **{key}**: {' '.join(texts[prompt].split())}"] if prompt in texts else []
        lines.append("")
    return "\n".join(lines)


def head(model: str, found: Found) -> str:
    """Return what stands above the tables."""
    return (
        f"# {model}: every method on the same windows, judged alike\n\n"
        f"Windows of {LENGTH} tokens that a method may see; nothing else is read. Gap closed: share of the gap in\n"
        "log-perplexity between rounding and full precision. KL, top-1 agreement and flips are against full\n"
        "precision. Means of seeds, ± the farthest. Minutes are CPU minutes of all processes that make the model,\n"
        "memory that of the largest, on machines that other work may have shared.\n"
        f"{sum('texts' in row for row in found.values())} rows so far.\n\n"
    )
