"""Whatever is in the files of a checkpoint, loading it and computing with it gives a model or an error of the user."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoint.conftest import Pack
from tests.checkpoint.mutants import copy_of, mutate, outcome


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(seed=st.integers(0, 2**32))
def test_an_altered_checkpoint(pack: Pack, tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    place: Path = tmp_path_factory.mktemp("mutant") / "model"
    mutate(copy_of(pack(), place), random.Random(seed))
    outcome(place)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_many_altered_checkpoints(pack: Pack, tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    place: Path = tmp_path_factory.mktemp("mutant") / "model"
    mutate(copy_of(pack(), place), random.Random(seed))
    outcome(place)
