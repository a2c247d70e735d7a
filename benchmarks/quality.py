"""The best uniform integers: this project beside every peer, on the same model, windows and bits, by one evaluator.

    python benchmarks/quality.py                                        # all that is missing: many hours
    python benchmarks/quality.py --methods rtn gptq awq hqq --budgets 192
    python benchmarks/quality.py --show                                 # what there is, and what is not run
    python benchmarks/quality.py --text mixed --output runs/quality-mixed --work runs/quality-mixed/rows

`--output` (benchmarks/quality) gets `results.json`, `results.md` and `answers.md`, anew behind each row. A finished row
is kept as long as what decides it is the same: the model, the windows, the settings, a peer's versions, and what is
asked; its hash is in `results.json`. A killed table goes on where it stopped, within a row, too, where the method can.
Another revision of this project is not noticed: `--again ours` makes its rows anew.

Peers run in environments of their own (`peer_environments.py`). A row that fails is said and left out; the next start
tries it again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quality_judging import TOKENS, Judge
from quality_making import RowFailedError, Source, make, recipe_of
from quality_rows import BUDGETS, FULL_PRECISION, METHODS, SEEDS, SPECS, Row, rows_of
from quality_table import answers, head, markdown

from eqat_mm.commands.plumbing.models import model_folder
from eqat_mm.commands.plumbing.runs import model_fingerprint, slug
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.data.text.windows import digest_of
from eqat_mm.errors import EqatError
from eqat_mm.runtime.files import read_json, write_json, write_text
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.provenance import provenance

TEXTS = {"Wikipedia": ("demo-wikipedia", 64), "Spanish": ("demo-wikipedia-es", 16), "code": ("demo-python", 16)}
"""Columns: a name, the source of the text, and windows of its held-out side."""
HELD_OUT_LENGTH = 512
MIXED = [{"path": "demo-wikipedia", "weight": 2}, {"path": "demo-wikipedia-es"}, {"path": "demo-python"}]
"""Text of all the columns' kinds, half of it Wikipedia."""


@dataclass
class Store:
    """Rows that are there, in `results.json`.

    Args:
        folder: of that file and of the tables.
        source: that rows are made from.
        columns: names of the texts.
    """

    folder: Path
    source: Source
    columns: list[str]

    def __post_init__(self) -> None:
        file = self.folder / "results.json"
        self.rows: dict[str, dict[str, Any]] = read_json(file)["rows"] if file.is_file() else {}

    def has(self, row: Row, decides: str) -> bool:
        """Whether a row is there as it would be made now."""
        there = self.rows.get(row.key, {})
        return "texts" in there and there["decides"] == decides

    def add(self, row: Row, facts: dict[str, Any]) -> None:
        """Keep a row, and write the tables anew."""
        self.rows[row.key] = facts
        self.write()

    def write(self) -> None:
        """Write the rows, the tables and the answers."""
        rows = rows_of(list(METHODS), list(SPECS))
        known = {row.key: self.rows[row.key] for row in rows if row.key in self.rows}
        write_json(self.folder / "results.json", {"model": self.source.model, "rows": known})
        write_text(
            self.folder / "results.md",
            head(self.source.model, known) + markdown(rows, known, self.columns).rstrip() + "\n",
        )
        write_text(self.folder / "answers.md", answers(rows, known).rstrip() + "\n")


def what_decides(row: Row, source: Source, judge: Judge) -> str:
    """Return the hash of all that decides a row."""
    made = {"recipe": recipe_of(row, source) if row.spec else None, "model": model_fingerprint(source.folder)}
    made["windows"] = digest_of(source.windows(row.windows)) if row.windows else None
    return _hash(made | {"judged": judge.decides})


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def add_row(row: Row, store: Store, judge: Judge, decides: str, folder: Path) -> bool:
    """Make and judge a row, and keep it; return whether that went well."""
    say(f"== {row.key}")
    facts = {"row": asdict(row), "decides": decides, "made": datetime.now(UTC).date().isoformat()}
    record = provenance("quality", {}, row.seed)
    facts |= {"revision": record["revision"], "versions": record["versions"]}
    try:
        facts |= _made(row, store.source, decides, folder)
        model = folder / "model" if row.spec else store.source.folder
        facts |= judge.verdict(model, row.bits)
    except (RowFailedError, EqatError) as error:
        say(f"{row.key}: {error}")
        store.add(row, facts | {"failed": str(error)})
        return False
    store.add(row, facts)
    shutil.rmtree(folder, ignore_errors=True)
    return True


def _made(row: Row, source: Source, decides: str, folder: Path) -> dict[str, Any]:
    """Return the facts of a row's model, which is in `folder`, made there before or now."""
    if row.method == FULL_PRECISION:
        return {"bits_per_weight": None}
    note = folder / "made.json"
    if (folder / "decides").is_file() and (folder / "decides").read_text(encoding="utf-8") != decides:
        shutil.rmtree(folder)
    if not note.is_file():
        write_text(folder / "decides", decides)
        write_json(note, make(row, source, folder))
    return dict(read_json(note))


def main() -> int:
    """Make the rows that are missing; return 1 where one has failed."""
    given = _parsed()
    text = json.dumps(MIXED) if given.text == "mixed" else given.text
    source = Source(given.model, model_folder(given.model), text)
    columns = {name: TEXTS[name] for name in given.texts}
    store = Store(given.output, source, list(columns))
    for key in [key for key in store.rows if key.split()[0] in given.again]:
        del store.rows[key]
    if given.show:
        store.write()
        print((given.output / "results.md").read_text(encoding="utf-8"))
        return 0
    texts = {
        name: TextWindows(text, part="held_out", length=HELD_OUT_LENGTH, count=count)
        for name, (text, count) in columns.items()
    }
    judge = Judge(source.folder, texts, tokens=given.tokens)
    failed = False
    for row in rows_of([FULL_PRECISION, *given.methods], given.specs, given.budgets, given.seeds):
        decides = what_decides(row, source, judge)
        if not store.has(row, decides):
            failed |= not add_row(row, store, judge, decides, given.work / slug(row.key))
    return int(failed)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--specs", nargs="+", default=SPECS, help="such as w4g64")
    parser.add_argument("--budgets", nargs="+", type=int, default=BUDGETS, help="windows a method may see")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--texts", nargs="+", choices=list(TEXTS), default=list(TEXTS), help="columns")
    parser.add_argument("--again", nargs="+", choices=list(METHODS), default=[], help="methods to make anew")
    parser.add_argument("--show", action="store_true", help="write the tables and print them; make nothing")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", default="demo-wikipedia", help="that methods see; mixed: of the columns' kinds")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of an answer, at most")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "quality")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="models that are being made")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
