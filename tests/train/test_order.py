"""The order of samples: the same whatever the number of processes; what fills the last batches counts for nothing."""

from __future__ import annotations

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from hypothesis import given, settings
from hypothesis import strategies as st

from eqat_mm.errors import ConfigError
from eqat_mm.train.e2e_qp import E2EQPConfig
from eqat_mm.train.order import Filled, Shuffled, WithBlank
from tests.checkpoint.files import assert_four_lines


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_samples_are_shuffled_as_accelerate_does(epoch: int) -> None:
    """So that runs of before go on."""
    expected = SeedableRandomSampler(range(23), data_seed=5)  # type: ignore[no-untyped-call]
    expected.set_epoch(epoch)  # type: ignore[no-untyped-call]
    order = Shuffled(23, seed=5)
    order.set_epoch(epoch)
    assert list(order) == list(expected)


@pytest.mark.parametrize(("count", "multiple", "blanks"), [(24, 8, 0), (23, 8, 1), (17, 8, 7), (3, 8, 5)])
def test_an_order_is_filled_up_with_blanks(count: int, multiple: int, blanks: int) -> None:
    filled = Filled(Shuffled(count, seed=0), multiple)
    assert len(filled) == len(list(filled)) == count + blanks
    assert sorted(filled) == list(range(count)) + [count] * blanks


def test_a_blank_counts_for_nothing() -> None:
    ids = torch.tensor([3, 4, 5])
    samples = WithBlank([{"input_ids": ids, "labels": torch.tensor([-100, 4, 5]), "pixel_values": torch.ones(1, 3)}])
    assert samples[0]["labels"].tolist() == [-100, 4, 5]
    assert samples[1]["labels"].tolist() == [-100] * 3
    assert samples[1]["input_ids"] is ids
    assert samples[1]["pixel_values"].shape == (1, 3)


def test_accumulation_follows_from_the_global_batch() -> None:
    config = E2EQPConfig(batch_size=4, accumulation=3, global_batch=32)
    assert [config.among(processes).accumulation for processes in (1, 2, 4, 8)] == [8, 4, 2, 1]
    assert config.among(8).among(2).accumulation == 4


def test_an_accumulation_that_does_not_count_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    E2EQPConfig(batch_size=4, accumulation=3, global_batch=32).among(2).among(2)
    E2EQPConfig(batch_size=4, global_batch=32).among(2)
    E2EQPConfig(batch_size=4, accumulation=4, global_batch=32).among(2)
    said = "--global_batch 32 in 2 processes is --accumulation 4, not 3\n"
    assert capsys.readouterr().out == said


def test_without_a_global_batch_accumulation_stays() -> None:
    assert E2EQPConfig(batch_size=4, accumulation=3).among(8).accumulation == 3


@settings(max_examples=200, deadline=None)
@given(wanted=st.integers(1, 300), batch=st.integers(1, 40), processes=st.integers(1, 20))
def test_a_global_batch_that_is_not_divided_names_one_change_that_is(wanted: int, batch: int, processes: int) -> None:
    config = E2EQPConfig(batch_size=batch, global_batch=wanted)
    if wanted % (batch * processes) == 0:
        assert config.among(processes).accumulation * batch * processes == wanted
        return
    with pytest.raises(ConfigError, match="--global_batch") as raised:
        config.among(processes)
    assert_four_lines(raised.value)
    name, value = raised.value.do.removeprefix("--").replace(",", "").split(" ")[:2]
    mended = {"batch_size": batch, "global_batch": wanted} | {name: int(value)}
    if name == "global_batch":  # then a batch size that divides it is the next thing said
        mended["batch_size"] = 1
    E2EQPConfig(**mended).among(processes)
