"""A tiny model, made once; not to be altered."""

from __future__ import annotations

import pytest

from tests.tiny_model import Tiny, save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return save_tiny(tmp_path_factory.mktemp("tiny"), blocks=2)
