"""One row of the table from end to end on a tiny model: judged rightly, kept, and made anew when it has to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eqat_mm.commands.plumbing.models import load_model
from eqat_mm.commands.verbs.evaluate import bits_per_weight
from eqat_mm.commands.verbs.quantize import RTNJob, rtn
from eqat_mm.data.text.windows import text_windows
from eqat_mm.errors import CheckpointError
from eqat_mm.quant.spec import QuantSpec
from tests.tiny_model import Tiny

CPU = torch.device("cpu")


def judge_of(tiny: Tiny, tokens: int = 4) -> Any:
    from quality_judging import Judge

    return Judge(tiny.folder, {"text": tiny.windows(3, held_out=True)}, prompts=("a b c",), tokens=tokens)


def store_of(tiny: Tiny, folder: Path) -> Any:
    from quality import Store
    from quality_making import Source

    return Store(folder, Source(str(tiny.folder), tiny.folder, str(tiny.text)), ["text"])


@pytest.fixture
def made_here(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let rounding run in this process; the rows that were made."""
    import quality
    from quality_rows import Row

    made: list[str] = []

    def make(row: Row, source: object, folder: Path) -> dict[str, Any]:
        made.append(row.key)
        rtn(RTNJob(str(tiny.folder), folder / "rtn", QuantSpec(row.bits, row.group_size)))
        (folder / "rtn" / "model").rename(folder / "model")
        took = {"cpu_seconds": 1.0, "peak_mib": 10, "stopped": False}
        return {"bits_per_weight": bits_per_weight(folder / "model")} | took

    monkeypatch.setattr(quality, "make", make)
    return made


def test_full_precision_is_at_no_distance_from_itself(tiny: Tiny) -> None:
    judge = judge_of(tiny)
    found = judge.verdict(tiny.folder, bits=0)
    model = load_model(tiny.folder, CPU)
    windows = text_windows(judge.tokenizer, tiny.windows(3, held_out=True))
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss
    assert found["texts"]["text"]["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)
    assert found["texts"]["text"]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert found["texts"]["text"]["flips"] == 0.0
    assert len(found["generation"]["texts"]) == 1


@pytest.mark.parametrize("bits", [2, 4])
def test_a_dequantized_model_is_on_its_grid_or_refused(tiny: Tiny, tmp_path: Path, bits: int) -> None:
    from quality_judging import require_grid

    for file in tiny.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="values among 32 weights"):
        require_grid(tmp_path, bits)
    tensors = load_file(tmp_path / "model.safetensors")
    step = 0.05
    rounded = {name: (weight / step).round().clamp(0, (1 << bits) - 1) * step for name, weight in tensors.items()}
    save_file(rounded, tmp_path / "model.safetensors", metadata={"format": "pt"})
    require_grid(tmp_path, bits)


def test_a_row_is_made_once_and_again_when_something_else_decides(
    tiny: Tiny, tmp_path: Path, made_here: list[str]
) -> None:
    from quality import add_row, what_decides
    from quality_rows import Row

    row, judge = Row("rtn", "w4g64"), judge_of(tiny)
    store = store_of(tiny, tmp_path / "table")
    decides = what_decides(row, store.source, judge)
    assert not store.has(row, decides)
    assert add_row(row, store, judge, decides, tmp_path / "work")
    assert store.has(row, decides)
    assert not (tmp_path / "work").exists()

    later = store_of(tiny, tmp_path / "table")
    assert later.has(row, what_decides(row, later.source, judge_of(tiny)))
    assert not later.has(row, what_decides(row, later.source, judge_of(tiny, tokens=5)))
    assert not later.has(row, what_decides(Row("rtn", "w3g64"), later.source, judge))
    found = later.rows[row.key]
    assert found["bits_per_weight"] == pytest.approx(4 + 20 / 64)
    assert found["texts"]["text"]["kl"] > 0
    assert made_here == [row.key]
    assert "| round-to-nearest |  |  | 4.31 |" in (tmp_path / "table" / "results.md").read_text(encoding="utf-8")


def test_a_model_that_was_made_before_the_kill_is_not_made_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_here: list[str]
) -> None:
    from quality import add_row, what_decides
    from quality_rows import Row

    row, judge, store = Row("rtn", "w4g64"), judge_of(tiny), store_of(tiny, tmp_path / "table")
    decides = what_decides(row, store.source, judge)
    with monkeypatch.context() as killed:
        killed.setattr(type(judge), "verdict", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            add_row(row, store, judge, decides, tmp_path / "work")
    assert not store.has(row, decides)
    assert add_row(row, store, judge, decides, tmp_path / "work")
    assert store.has(row, decides)
    assert made_here == [row.key]


def test_what_was_made_by_other_settings_is_not_taken_for_a_row(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_here: list[str]
) -> None:
    from quality import add_row
    from quality_rows import Row

    row, judge, store = Row("rtn", "w4g64"), judge_of(tiny), store_of(tiny, tmp_path / "table")
    with monkeypatch.context() as killed:
        killed.setattr(type(judge), "verdict", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            add_row(row, store, judge, "before", tmp_path / "work")
    assert add_row(row, store, judge, "now", tmp_path / "work")
    assert made_here == [row.key, row.key]


@pytest.mark.slow
def test_our_commands_make_a_row_and_say_what_it_took(tiny: Tiny, tmp_path: Path) -> None:
    from quality_making import Source, make
    from quality_rows import Row

    source = Source(str(tiny.folder), tiny.folder, str(tiny.text))
    facts = make(Row("rtn", "w4g64"), source, tmp_path)
    assert (tmp_path / "model" / "config.json").is_file()
    assert facts["bits_per_weight"] == pytest.approx(4 + 20 / 64)
    assert facts["cpu_seconds"] > 0
    assert facts["peak_mib"] > 100
    assert not facts["stopped"]


def test_a_row_that_fails_is_said_and_tried_again(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import quality
    import quality_making
    from quality_rows import Row

    row, judge, store = Row("hqq", "w4g64"), judge_of(tiny), store_of(tiny, tmp_path / "table")
    monkeypatch.setattr(quality_making, "environment_of", lambda name: Path("/bin/false"))
    assert not quality.add_row(row, store, judge, "decides", tmp_path / "work")
    assert not store.has(row, "decides")
    assert "by_hqq ended with status 1" in store.rows[row.key]["failed"]
    assert "| HQQ |  | failed |" in (tmp_path / "table" / "results.md").read_text(encoding="utf-8")
