"""What the package is called by: quick to import, complete, typed."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import eqat_mm

ROOT = Path(__file__).resolve().parents[2]

QUICK = """
import sys, time
began = time.process_time()
import eqat_mm
took = time.process_time() - began
assert not {"torch", "transformers", "jsonargparse"} & set(sys.modules), "too much is imported"
assert took < 0.1, took
"""


def test_importing_is_quick() -> None:
    subprocess.run([sys.executable, "-c", QUICK], check=True, timeout=60)


@pytest.mark.parametrize("name", eqat_mm.__all__)
def test_every_name_is_there(name: str) -> None:
    found = getattr(eqat_mm, name)
    assert name in dir(eqat_mm)
    if name != "__version__":
        assert inspect.getdoc(found)
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        eqat_mm.no_such  # noqa: B018


@pytest.mark.parametrize("name", ["quantize", "tune", "evaluate", "plan_for", "train_only"])
def test_every_argument_is_explained(name: str) -> None:
    function = getattr(eqat_mm, name)
    text = inspect.getdoc(function) or ""
    for argument in inspect.signature(function).parameters:
        assert f"    {argument.replace('more', '**more')}:" in text
    assert "Raises:" in text


def blocks() -> list[str]:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/python.md")]
    return [block for text in texts for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)]


@pytest.mark.parametrize("block", blocks(), ids=lambda block: block.partition("\n")[0][:40])
def test_documented_python_names_what_there_is(block: str) -> None:
    tree = ast.parse(block)
    named = [each.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "eqat_mm"
             for each in node.names]  # fmt: skip
    named += [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
              and isinstance(node.value, ast.Name) and node.value.id == "eqat_mm"]  # fmt: skip
    assert set(named) <= set(eqat_mm.__all__)


def test_the_five_lines_are_the_same_everywhere() -> None:
    assert blocks()[0] == blocks()[1]
    assert "quantize(" in blocks()[0]
