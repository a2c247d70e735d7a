"""Charts as SVG that takes its colours from the page, so that they suit a light and a dark one.

No word of a file is ever drawn: names stand in the page, beside the keys of the lines, where they are escaped.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from eqat_mm.errors import ConfigError

Points = Sequence[tuple[float, float]]

COLOURS = 6
"""Lines that can be told apart: `--c0` to `--c5` of the style sheet, each with dashes of its own."""
DASHES = ("", "5 2", "1.5 1.5", "6 2 1.5 2", "3 1", "8 3")
"""Of the lines, as SVG writes them."""

_LINES = [f"#0101{index:02x}" for index in range(COLOURS)]
_INK, _GRID = "#0101f0", "#0101f1"
_VARIABLES = {colour: f"var(--c{index})" for index, colour in enumerate(_LINES)}
_VARIABLES |= {_INK: "var(--soft)", _GRID: "var(--line)"}
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.xmargin": 0.02,
    "font.size": 9.5,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}


@dataclass(frozen=True)
class Line:
    """One line of a panel.

    Attributes:
        points: x and y.
        key: which of the `COLOURS`.
        band: lower and upper edge around each point; none by default.
        dots: mark every point.
    """

    points: Points
    key: int = 0
    band: Points = ()
    dots: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: what the y axis shows.
        lines: in it.
        x: what the x axis shows.
        log: whether the y axis is logarithmic, where there is room for it; all values are above zero then.
        percent: whether y is a share.
        wide: width relative to the others of the chart.
    """

    title: str
    lines: Sequence[Line]
    x: str
    log: bool = False
    percent: bool = False
    wide: float = 1.0

    @property
    def drawn(self) -> bool:
        """Whether there is something to draw."""
        return any(line.points for line in self.lines)

    @property
    def spread(self) -> float:
        """Largest value divided by the smallest."""
        values = [value for line in self.lines for _, value in line.points]
        values += [edge for line in self.lines for edges in line.band for edge in edges]
        return max(values) / min(values)


def require_charts() -> None:
    """Check that what draws is installed.

    Raises:
        ConfigError: it is not.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError(
            where="eqat report",
            given="the package matplotlib is not installed",
            allowed="an environment with it: it draws the charts",
            do="pip install 'eqat-mm[report]'",
        )


def chart(name: str, panels: Sequence[Panel], alt: str, height: float = 2.5) -> str:
    """Draw panels side by side; an empty string where none has a point.

    Args:
        name: of the chart, unique on the page: letters and digits.
        panels: those without a point are left out.
        alt: what the chart shows, in words of ours, for those who do not see it.
        height: in inches; the width is that of the page.

    Returns:
        An SVG element.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels = [panel for panel in panels if panel.drawn]
    if not panels:
        return ""
    with mpl.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(9.6, height), layout="constrained")
        widths = {"width_ratios": [panel.wide for panel in panels]}
        row = figure.subplots(1, len(panels), squeeze=False, gridspec_kw=widths)[0]
        for axes, panel in zip(row, panels, strict=True):
            _draw(axes, panel)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    return _inline(file.getvalue(), name, alt)


def _draw(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

    axes.set_title(panel.title)
    axes.set_xlabel(panel.x)
    for line in panel.lines:
        _draw_line(axes, line)
    if panel.log and panel.spread > 8:
        axes.set_yscale("log")
        some = "1" if panel.spread > 100 else "25"  # of the digits between powers of ten
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in some else ""))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _draw_line(axes: Any, line: Line) -> None:
    colour, dashes = _LINES[line.key % COLOURS], DASHES[line.key % COLOURS]
    x, y = [point[0] for point in line.points], [point[1] for point in line.points]
    if line.band:
        low, high = zip(*line.band, strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
    style = (0, tuple(float(part) for part in dashes.split())) if dashes else "-"
    marker = "o" if line.dots or len(x) == 1 else None
    axes.plot(x, y, color=colour, linestyle=style, marker=marker, markersize=3.2)


def _inline(svg: str, name: str, alt: str) -> str:
    """Return the SVG element of a file: its names unique in a page, its colours and letters those of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>| font-family: [^;]*;", "", svg, flags=re.S)
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'xlink:href="#([^"]*)"', rf'href="#{name}-\1"', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub("#[0-9a-f]{6}", lambda found: _VARIABLES.get(found[0], found[0]), svg)
    size = re.search(r'viewBox="[^"]*"', svg)
    assert size is not None, "no SVG of matplotlib"
    head = f'<svg class="chart" role="img" aria-label="{alt}" {size[0]}>'
    return re.sub(r"\n\s*", "\n", head + svg[svg.index(">") + 1 :]).strip()
