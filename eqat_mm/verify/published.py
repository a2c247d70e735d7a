"""A run of Block-AP beside what EfficientQAT published of its own: losses of blocks, memory, perplexity.

Figures are those of the published model cards, logs and tables (arXiv 2407.11062), in `published.json`: `peak_gb`, the
memory of Block-AP on one GPU; `losses`, by bits and block, the validation loss behind the first epoch and, where there
are two numbers, behind the last; `reached`, by spec, the perplexity on the test text of WikiText-2 in windows of 2,048
tokens, and the mean accuracy in per cent of five zero-shot tasks, behind Block-AP alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from eqat_mm.quant.spec import QuantSpec
from eqat_mm.report.curves import peak_of
from eqat_mm.report.found import Record, Stage, number, table
from eqat_mm.report.planned import computed_on_cpu
from eqat_mm.verify.checks import Check

FACTOR = 2.0
"""A loss within this factor of the published one counts as equal: the text is another sample of the same kind."""
ASKED = {
    "calibration.count": 4096,
    "calibration.length": 2048,
    "fit.loss": "mse",
    "fit.epochs": 2,
    "fit.batch_size": 2,
    "fit.lr_scale": 1e-4,
    "start.init": "minmax",
}
"""Published settings at all widths; the rate of W is 2e-5 at 2 bits, 1e-5 above."""


@dataclass(frozen=True)
class Published:
    """What is published of one model.

    Attributes:
        title: of it.
        names: of its folders and repositories, in lower case.
        shape: entries of its config.json.
        peak_gb: memory of Block-AP on one GPU, 10^9 bytes; None where it is not published.
        losses: bits -> block -> validation losses.
        reached: spec -> perplexity and accuracy.
    """

    title: str
    names: list[str]
    shape: dict[str, int]
    peak_gb: float | None
    losses: dict[str, dict[str, list[float]]]
    reached: dict[str, tuple[float, float]]


def published_of(config: Record) -> Published | None:
    """Return what is published of models of the shape in a config.json; None for another shape."""
    text = (files("eqat_mm.verify") / "published.json").read_text("utf-8")
    for title, facts in json.loads(text).items():
        if facts["shape"].items() <= config.items():
            return Published(title, **facts)
    return None


def published_checks(stage: Stage, config: Record) -> Iterator[Check]:
    """Yield how a run of Block-AP compares with the published one.

    Nothing is judged where model or settings are others; the figures are shown all the same.

    Args:
        stage: the run.
        config: config.json of its model.
    """
    published = published_of(config)
    if stage.command != "block-ap" or published is None:
        return
    quant = table(stage.setting("quant"))
    if quant.get("allocation"):
        yield Check("published run", None, "bits of each linear, of which nothing is published")
        return
    spec = QuantSpec(**quant)
    differing = list(_differing(stage, spec, published))
    same = f"model and settings as of {published.title}"
    yield Check("published run", None if differing else True, "; ".join(differing) or same)
    yield from _losses(stage, published.losses.get(str(spec.bits), {}), judged=not differing)
    yield from _memory(stage, published, judged=not differing)
    yield from _reached(published, spec)


def _differing(stage: Stage, spec: QuantSpec, published: Published) -> Iterator[str]:
    """Yield what keeps a run from being compared."""
    name = str(stage.setting("model")).rstrip("/").rsplit("/", 1)[-1]
    if name.lower() not in published.names:
        yield f"model {name}, not {published.title}"
    for path, expected in (ASKED | {"fit.lr_weight": 2e-5 if spec.bits == 2 else 1e-5}).items():
        value: Any = stage.record.get("config")
        for part in path.split("."):
            value = table(value).get(part)
        if value != expected:
            yield f"{path} {value}, published {expected}"


def _losses(stage: Stage, published: dict[str, list[float]], *, judged: bool) -> Iterator[Check]:
    """Yield the validation losses of blocks of which some are published."""
    blocks = {str(record.get("block")): record for record in stage.metrics}
    for block, expected in published.items():
        epochs = [number(loss) for loss in blocks.get(block, {}).get("validation", [])]
        for found, wanted in zip((epochs[0], epochs[-1]) if epochs else (), expected, strict=False):
            if found is not None:
                passed = 1 / FACTOR <= found / wanted <= FACTOR
                said = f"{found:.3g}, published {wanted:.3g} ({found / wanted:.2f})"
                yield Check(f"loss of block {block}", passed if judged else None, said)


def _memory(stage: Stage, published: Published, *, judged: bool) -> Iterator[Check]:
    peak = None if computed_on_cpu(stage) else peak_of(stage)
    if published.peak_gb is not None and peak is not None:
        said = f"{peak / 1e9:.2f} GB at the peak, published {published.peak_gb} GB"
        yield Check("published memory", peak <= 1e9 * published.peak_gb if judged else None, said)


def _reached(published: Published, spec: QuantSpec) -> Iterator[Check]:
    if spec.name in published.reached:
        perplexity, accuracy = published.reached[spec.name]
        said = f"WikiText-2 perplexity {perplexity}, accuracy of five zero-shot tasks {accuracy}%"
        yield Check("to be reached", None, f"{said} ({published.title} {spec.name}, Block-AP alone)")
