"""What the package is called by: quick to import, complete, typed."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import eqat_mm

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
