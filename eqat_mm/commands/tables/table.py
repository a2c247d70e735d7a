"""A table of models: rows made in turn, each judged once and noted; a stopped table goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eqat_mm.commands.plumbing.runs import noted, slug
from eqat_mm.runtime.files import remove_unfinished, write_json
from eqat_mm.runtime.progress import say

Row = dict[str, Any]


class Table:
    """The rows so far; each new one is printed with those before it, and all are kept in `results.json`.

    Args:
        root: folder of that file, and of the notes of what was judged, `eval`.
        command: that makes the table.
        results: returns what the file says, rows and all.
        shown: returns the rows as lines of text.
        anew: judge each row again.

    Attributes:
        rows: so far.
    """

    def __init__(
        self,
        root: Path,
        command: str,
        results: Callable[[list[Row]], Row],
        shown: Callable[[list[Row]], str],
        *,
        anew: bool,
    ) -> None:
        self.root, self.command, self.anew = root, command, anew
        self.rows: list[Row] = []
        self._results, self._shown = results, shown
        remove_unfinished(root / "results.json")

    def add(
        self,
        key: str,
        decides: Row,
        judge: Callable[[], Row],
        about: Callable[[Row], Mapping[str, Any]],
        *,
        anew: bool = False,
    ) -> None:
        """Judge a row, unless that was noted before, and show the table.

        Args:
            key: words that name the row's note.
            decides: what decides the verdict, JSON-ready.
            judge: returns it.
            about: returns the row, given the verdict.
            anew: judge it again in any case.
        """
        verdict = noted(self.root / "eval" / slug(key), self.command, decides, judge, anew=self.anew or anew)
        self.rows.append(dict(about(verdict)))
        write_json(self.root / "results.json", self._results(self.rows))
        say(self._shown(self.rows))
