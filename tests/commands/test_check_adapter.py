"""`eqat check-adapter`: which adapter is meant, what is printed, and the exit status."""

from __future__ import annotations

from pathlib import Path

import pytest

from eqat_mm.cli import main
from eqat_mm.commands.verbs.check_adapter import CheckAdapterJob, check_adapter
from eqat_mm.contract import CHECKS
from eqat_mm.errors import AdapterError

GOOD = """
from dataclasses import replace
from llava_adapters.llama import ARCH as LLAMA
from llava_adapters.tiny import tiny_causal_lm

ARCH = replace(LLAMA, name="mine", model_types=("qwen2",), tiny=lambda: tiny_causal_lm("qwen2"))
"""


def test_an_adapter_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(GOOD)
    assert main(["check-adapter", str(tmp_path / "mine.py")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mine: 7 linears in 4 stages of model.layers"
    assert len(lines) == 1 + len(CHECKS)
    assert all(line.startswith(("  ok    ", "  -     ")) for line in lines[1:])


def test_a_broken_one_ends_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(GOOD.replace("tiny=", 'norms=(("input_layernorm", "mlp.gate_proj"),), tiny='))
    assert main(["check-adapter", str(tmp_path / "mine.py")]) == 2
    said = capsys.readouterr()
    (failed,) = (line for line in said.out.splitlines() if line.startswith("  FAIL"))
    assert "SmoothQuant" in failed
    assert "eqat check-adapter mine" in said.err
    assert f"1 of {len(CHECKS)} checks failed" in said.err


def test_a_reason_is_given_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(GOOD.replace("tiny=", "full_precision=(), tiny="))
    assert main(["check-adapter", str(tmp_path / "mine.py")]) == 2
    said = capsys.readouterr().out
    assert said.count("in no declared part") == 1
    assert said.count("for a reason that is given above") > 5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("import nothing_of_that_name", "ModuleNotFoundError"),
        ("ARCH = 3", "int"),
        ("x = 3", "nothing"),
        ("from llava_adapters.llama import ARCH as A\nfrom llava_adapters.mistral import ARCH as B", "Arch, Arch"),
    ],
)
def test_a_file_without_an_adapter(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(AdapterError) as caught:
        check_adapter(CheckAdapterJob(str(path)))
    assert caught.value.where == str(path)
    assert said in caught.value.given


def test_a_name_and_an_entry_point() -> None:
    with pytest.raises(AdapterError, match="eqat check-adapter") as caught:
        check_adapter(CheckAdapterJob("lama"))
    assert "llama" in caught.value.allowed
    with pytest.raises(AdapterError, match="has no attribute 'NOTHING'"):
        check_adapter(CheckAdapterJob("llava_adapters.llama:NOTHING"))
