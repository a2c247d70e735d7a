"""Exports of every format against their checkpoint: the same, and what is said of broken ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from eqat_mm.errors import ExportError
from eqat_mm.export.card import Facts
from eqat_mm.export.folder import EXPORT, write_export
from eqat_mm.export.form import Choices, format_called
from eqat_mm.export.opened import open_packed
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import sha256_of
from eqat_mm.runtime.sealed import read_sealed, write_sealed
from eqat_mm.verify.checks import Check
from eqat_mm.verify.exported import export_checks
from eqat_mm.verify.formats.part import READERS
from tests.export.made import packed, packed_llava
from tests.tiny_model import mixed_bits

MAKERS: dict[str, Callable[..., Path]] = {"llama": packed, "llava": packed_llava}
CASES = [
    ("gguf", "llama", QuantSpec(2, 64, symmetric=True)),
    ("gguf", "llama", QuantSpec(3, 32, symmetric=True)),
    ("gguf", "llama", QuantSpec(2, 32)),
    ("gguf", "llava", QuantSpec(4, 32, symmetric=True)),
    ("mlx", "llama", QuantSpec(3, 32)),
    ("mlx", "llava", QuantSpec(2, 64, symmetric=True)),
    ("gguf", "llama", QuantSpec(2, 32, symmetric=True, allocation=mixed_bits())),
    ("mlx", "llava", QuantSpec(2, 32, allocation=mixed_bits())),
    ("onnx", "llama", QuantSpec(2, 32)),
    ("onnx", "llama", QuantSpec(4, 64, symmetric=True)),
    ("gptq", "llama", QuantSpec(3, 64)),
    ("gptq", "llama", QuantSpec(4, -1, symmetric=True)),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2].name}")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of an export and of its checkpoint, not to be altered."""
    form, kind, spec = request.param
    folder = tmp_path_factory.mktemp("exported")
    source = MAKERS[kind](folder, spec)
    model, choices = open_packed(source), Choices()
    format_called(form).refuse(model, choices)
    write_export(model, format_called(form), folder / form, choices, Facts(form, spec.bits))
    return folder / form, source


def looked(folder: Path, source: Path | None, text: str | None = None) -> dict[str, Check]:
    return {check.name: check for check in export_checks(folder, source, text)}


def failed(found: dict[str, Check]) -> dict[str, str]:
    return {name: check.said for name, check in found.items() if check.passed is False}


def test_a_good_export_passes(exported: tuple[Path, Path]) -> None:
    found = looked(*exported, text="an and in")
    assert found.keys() == {"export", "files", "source", "weights", "others", "logits"}
    assert failed(found) == {}
    assert all(check.passed for check in found.values())
    assert "every weight the same" in found["weights"].said


def test_a_flipped_bit_of_any_weight_is_found(exported: tuple[Path, Path], tmp_path: Path) -> None:
    """Also where the list of files was brought up to date."""
    folder, source = Path(shutil.copytree(exported[0], tmp_path / "folder")), exported[1]
    path = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    before, draw = path.read_bytes(), np.random.default_rng(0)
    for place in draw.integers(len(before) // 2, len(before), 4):
        path.write_bytes(before[:place] + bytes([before[place] ^ 0x41]) + before[place + 1 :])
        assert f"{path.name}: altered" in failed(looked(folder, None))["file"]
        entry = read_sealed(folder / EXPORT)
        write_sealed(folder / EXPORT, entry | {"files": entry["files"] | {path.name: sha256_of(path)}})
        assert failed(looked(folder, source)).keys() & {"weights", "others"}
        write_sealed(folder / EXPORT, entry)


def test_another_checkpoint_than_its_own(exported: tuple[Path, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(exported[1], tmp_path / "model"))
    (source / "eqat.json").write_bytes((source / "eqat.json").read_bytes() + b"\n")
    assert failed(looked(exported[0], source)) == {"source": f"{source} is another checkpoint"}
    assert looked(exported[0], None)["weights"].passed is None


def test_there_is_a_reader_of_every_format() -> None:
    from typing import get_args

    from eqat_mm.export.form import FormatName

    assert set(get_args(FormatName)) <= READERS.keys()


@pytest.mark.parametrize("form", ["onnx", "gptq"])
def test_a_format_with_one_width_refuses_several(tmp_path: Path, form: str) -> None:
    model = open_packed(packed(tmp_path, QuantSpec(2, 32, allocation=mixed_bits())))
    with pytest.raises(ExportError, match="linears of 2 to 4 bits") as raised:
        format_called(form).refuse(model, Choices())
    assert "--to mlx or gguf" in raised.value.do
