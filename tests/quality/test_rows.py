"""What the table of `benchmarks/quality.py` is made of, without making a model of any size."""

from __future__ import annotations

import json
import math
import re

import pytest

from eqat_mm.commands.line.resolved import job_of
from eqat_mm.commands.verbs.quantize import BlockAPJob
from eqat_mm.commands.verbs.tune import E2EQPJob
from eqat_mm.data.text.settings import TextSource


def test_a_method_that_reads_and_draws_nothing_has_one_row_for_each_width() -> None:
    from quality_rows import SPECS, rows_of

    keys = [row.key for row in rows_of(["full-precision", "rtn", "gptq", "ours"], SPECS, (8, 16), (0, 1))]
    assert keys[0] == "full-precision"
    assert [key for key in keys if key.startswith("rtn")] == [f"rtn {spec}" for spec in SPECS]
    assert len([key for key in keys if key.startswith("gptq")]) == 4 * 2
    assert len([key for key in keys if key.startswith("ours")]) == 4 * 2 * 2
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", ["hqq", "llm-compressor", "auto-round"])
def test_the_versions_of_a_peer_are_exact(name: str) -> None:
    from peer_environments import peer_names, pins_of
    from quality_rows import METHODS

    assert name in peer_names()
    assert name in {method.peer[0] for method in METHODS.values() if method.peer}
    assert all(re.fullmatch(r"[\w.-]+==[\d.]+(post\d+)?", pin) for pin in pins_of(name))


def test_a_version_that_is_open_is_refused(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    import peer_environments

    monkeypatch.setattr(peer_environments, "PEERS", tmp_path)
    (tmp_path / "some.txt").write_text("# a comment\n\na==1.0\nb>=2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="'b>=2'"):
        peer_environments.pins_of("some")


def test_each_script_of_a_peer_is_there() -> None:
    from peer_environments import PEERS
    from quality_rows import METHODS

    for method in METHODS.values():
        if method.peer is not None:
            assert (PEERS / f"{method.peer[1]}.py").is_file()


@pytest.mark.parametrize("method", ["ours", "ours-symmetric", "paper"])
@pytest.mark.parametrize("spec", ["w4g64", "w4g32", "w3g64", "w2g64"])
@pytest.mark.parametrize(("windows", "mixed"), [(192, False), (192, True), (2400, False)])
def test_our_commands_are_taken_and_see_no_more_than_they_may(
    method: str, spec: str, windows: int, mixed: bool
) -> None:
    from pathlib import Path

    from quality import MIXED
    from quality_making import Source, recipe_of
    from quality_rows import Row

    row = Row(method, spec, windows)
    text = [TextSource(**each) for each in MIXED] if mixed else "demo-wikipedia"
    source = Source("smollm2-135m", Path(), json.dumps(MIXED) if mixed else "demo-wikipedia")
    (_, *fitted), (_, *trained) = recipe_of(row, source)["commands"]
    fit = job_of("block-ap", BlockAPJob, [*fitted, "--model", "smollm2-135m"])
    tuned = job_of("e2e-qp", E2EQPJob, [*trained, "--model", "smollm2-135m"])
    assert fit.quant.bits == row.bits
    assert fit.quant.group_size == row.group_size
    assert fit.quant.symmetric == tuned.quant.symmetric == (method == "ours-symmetric")
    for data in (fit.calibration, tuned.data):
        assert (data.source, data.part, data.length, data.seed) == (text, "train", 256, 0)
        assert data.count <= windows
    assert fit.fit.validation_samples < fit.calibration.count
    assert (fit.start.init == "minmax") == (method == "paper")


def test_the_share_of_the_gap_is_of_log_perplexity() -> None:
    from quality_table import gap_closed

    assert gap_closed(100.0, rounding=100.0, full=10.0) == 0.0
    assert gap_closed(10.0, rounding=100.0, full=10.0) == pytest.approx(1.0)
    assert gap_closed(math.sqrt(1000.0), rounding=100.0, full=10.0) == pytest.approx(0.5)


def judged(perplexity: float, repeated: float | None = 0.25) -> dict[str, object]:
    figures = {"perplexity": perplexity, "kl": 0.5, "top1_agreement": 0.75, "flips": 0.125}
    said = {"repeated_4grams": repeated, "texts": ["Paris\nis"], "asked": ["Where?"]}
    took = {"cpu_seconds": 90.0, "peak_mib": 2048, "stopped": False}
    return {"texts": {"Wikipedia": figures}, "generation": said, "bits_per_weight": 4.3125} | took


def test_rows_that_were_not_run_say_so_and_seeds_are_averaged() -> None:
    from quality_rows import Row, rows_of
    from quality_table import answers, markdown

    rows = rows_of(["full-precision", "rtn", "gptq", "ours"], ["w4g64"], [192], [0, 1])
    found = {row.key: judged(100.0) for row in rows if row.method == "rtn"}
    found |= {Row("full-precision").key: judged(10.0, None) | {"bits_per_weight": None}}
    found |= {row.key: judged(20.0 + 10 * row.seed) for row in rows if row.method == "ours"}
    lines = markdown(rows, found, ["Wikipedia"]).splitlines()  # type: ignore[arg-type]
    ours, gptq = (next(line for line in lines if line.startswith(f"| {name} |")) for name in ("ours", "GPTQ"))
    assert "| 192 | 2 | 4.31 | 25.00 ± 5.00 |" in ours
    assert "| 25% " in ours
    assert "| 1.5 | 2.0 |" in ours
    assert "| 192 | not run |" in gptq
    assert {line.count("|") for line in lines if line.startswith("|")} == {13}
    assert "- **rtn w4g64**: Paris is" in answers(rows, found)  # type: ignore[arg-type]
