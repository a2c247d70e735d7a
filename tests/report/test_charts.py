"""Charts: in the colours of the page, with names of their own, and only what can be drawn."""

from __future__ import annotations

import re

import pytest

from eqat_mm.report.charts import COLOURS, DASHES, Line, Panel, chart
from eqat_mm.report.curves import block_panels, points, step_panels

RISING = [(float(x), x + 1.0) for x in range(8)]


def test_a_chart_takes_its_colours_from_the_page() -> None:
    svg = chart("one", [Panel("loss", [Line(RISING, key) for key in range(COLOURS)], "step")], "Loss.")
    assert svg.startswith('<svg class="chart" role="img" aria-label="Loss."')
    assert svg.endswith("</svg>")
    assert all(f"var(--c{key})" in svg for key in range(COLOURS))
    assert re.findall(r"#[0-9a-f]{6}|http|<style|<metadata|font-family", svg) == []
    assert len(svg) < 40_000


def test_lines_are_told_apart_without_colour() -> None:
    assert len(set(DASHES)) == COLOURS


def test_two_charts_share_no_name() -> None:
    panel = Panel("loss", [Line(RISING, band=[(0.5, 9.0)] * 8)], "step")
    first, second = (set(re.findall(r'\bid="([^"]*)"', chart(name, [panel], ""))) for name in ("one", "two"))
    assert first
    assert not first & second


def test_the_same_points_give_the_same_chart() -> None:
    panel = Panel("loss", [Line(RISING)], "step")
    assert chart("one", [panel], "") == chart("one", [panel], "")


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("values", [[3.0], [1e-6, 1e6], [2.0, 2.0], [1.0, 20.0]])
def test_few_points_are_drawn_too(values: list[float], log: bool) -> None:
    panel = Panel("loss", [Line(list(enumerate(values)))], "step", log=log)
    assert "var(--c0)" in chart("one", [panel], "")


def test_an_empty_panel_is_left_out_and_an_empty_chart_is_nothing() -> None:
    empty, full = Panel("norm", [Line([])], "step"), Panel("loss", [Line(RISING)], "step")
    assert chart("one", [empty], "") == ""
    svg = chart("one", [empty, full], "")
    assert ">loss<" in svg
    assert ">norm<" not in svg


def test_only_pairs_of_finite_numbers_are_points() -> None:
    records = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None},
        {"step": 3, "loss": float("inf")},
        {"step": "4", "loss": 1.0},
        {"step": 5, "loss": 0.5},
    ]
    assert points(records, "step", "loss", shift=1) == [(2, 2.0), (6, 0.5)]


def test_blocks_are_counted_from_one_and_zero_has_no_logarithm() -> None:
    records = [{"block": 0, "loss_before": 2.0, "loss_after": 0.0, "relative_error": None}]
    loss, error = block_panels(records)
    assert [line.points for line in loss.lines] == [[(1, 2.0)], []]
    assert not error.drawn


def test_a_log_of_nothing_has_no_curves() -> None:
    assert not any(panel.drawn for panel in step_panels([{"train_runtime": 3.0}]))
