"""Tiny models, made once and not to be altered; memory enough, whatever else this machine does."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import psutil
import pytest
from PIL import ImageFile

from eqat_mm.plan import machine
from tests.commands.image_bed import Bed, bed_of
from tests.tiny_model import Tiny, save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return save_tiny(tmp_path_factory.mktemp("tiny"), blocks=2)


@pytest.fixture(scope="module")
def beds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bed]:
    made: dict[str, Bed] = {}

    def bed(name: str) -> Bed:
        if name not in made:
            made[name] = bed_of(name, tmp_path_factory.mktemp(name))
        return made[name]

    return bed


@pytest.fixture
def bed(beds: Callable[[str], Bed]) -> Bed:
    return beds("llava")


@pytest.fixture(autouse=True)
def memory_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(available=2**40)
    monkeypatch.setattr(machine, "psutil", SimpleNamespace(Process=psutil.Process, virtual_memory=lambda: free))


@pytest.fixture(autouse=True)
def _refuse_truncated_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's own setting: importing lmms-eval, as other tests do, changes it for the whole process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
