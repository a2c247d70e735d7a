"""The table that every ladder of models is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eqat_mm.commands.tables.table import Row, Table


def table_in(root: Path, *, anew: bool = False) -> Table:
    def results(rows: list[Row]) -> Row:
        return {"rows": rows}

    return Table(root, "a-table", results, lambda rows: f"{len(rows)} rows, the last {rows[-1]}", anew=anew)


def judged(table: Table, calls: list[str], key: str, value: int, **decides: Any) -> None:
    def judge() -> Row:
        calls.append(key)
        return {"value": value}

    table.add(key, decides, judge, lambda verdict: {"name": key} | verdict)


def test_rows_are_kept_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = table_in(tmp_path)
    judged(table, [], "first", 1)
    judged(table, [], "second", 2)
    assert table.rows == [{"name": "first", "value": 1}, {"name": "second", "value": 2}]
    assert json.loads((tmp_path / "results.json").read_text()) == {"rows": table.rows}
    assert "2 rows, the last {'name': 'second', 'value': 2}" in capsys.readouterr().out


def test_a_row_is_judged_once_unless_what_decides_it_changes(tmp_path: Path) -> None:
    calls: list[str] = []
    for decides, value in (("a", 1), ("a", 2), ("b", 3)):
        table = table_in(tmp_path)
        judged(table, calls, "row", value, decides=decides)
    assert calls == ["row", "row"]
    assert table.rows == [{"name": "row", "value": 3}]
    judged(table_in(tmp_path, anew=True), calls, "row", 4, decides="b")
    assert len(calls) == 3


def test_what_a_killed_table_left_is_removed(tmp_path: Path) -> None:
    left, others = tmp_path / ".results.json.0a1b2c3d.partial", tmp_path / ".other.json.0a1b2c3d.partial"
    for path in (left, others):
        path.write_text("{")
    table_in(tmp_path)
    assert not left.exists()
    assert others.exists()
