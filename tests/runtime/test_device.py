"""Which device is chosen, and that a GPU becomes the current one."""

from __future__ import annotations

import pytest
import torch

from eqat_kernels import use
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.device import best_device
from tests.checkpoint.files import assert_four_lines


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Two GPUs; returns the devices that became the current one, as they do."""
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return made


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="auto") as raised:
        best_device(device)
    assert_four_lines(raised.value)


def test_without_a_gpu_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert best_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)], ids=lambda value: str(value)
)
def test_a_gpu_becomes_the_current_one(current: list[torch.device], device: str, index: int) -> None:
    assert best_device(device) == torch.device("cuda", index)
    assert current == [torch.device("cuda", index)]


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize(("rank", "index"), [("0", 0), ("1", 1), ("3", 1)])
def test_every_process_of_a_launcher_has_its_own(
    current: list[torch.device], monkeypatch: pytest.MonkeyPatch, device: str, rank: str, index: int
) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert best_device(device) == torch.device("cuda", index)
    assert current == [torch.device("cuda", index)]


def test_the_cpu_stays_the_cpu(current: list[torch.device]) -> None:
    assert best_device("cpu") == torch.device("cpu")
    assert current == []


@pytest.mark.parametrize("name", ["triton", "fastest"])
def test_kernels_that_do_not_run_on_the_device(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("EQAT_KERNELS", name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use(name), pytest.raises(ConfigError, match="unset EQAT_KERNELS") as caught:
        best_device("cpu")
    assert_four_lines(caught.value)


def test_kernels_that_run_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQAT_KERNELS", "reference")
    with use("reference"):
        assert best_device("cpu").type == "cpu"
