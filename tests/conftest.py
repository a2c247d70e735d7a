"""Every test runs seeded, on one thread, offline, with Triton interpreted, signals heard and a cache of its own.

The environment is set before torch is imported: thread counts and the Triton interpreter are read once.
"""

from __future__ import annotations

import os

for _name, _value in {
    "OMP_NUM_THREADS": "1",  # one thread for each of the xdist workers
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRITON_INTERPRET": "1",  # Triton kernels run on the CPU; `make test-gpu` sets 0
}.items():
    os.environ.setdefault(_name, _value)

import random
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
for _number, _heard in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:  # by nohup, or a shell that started the tests in the background
        signal.signal(_number, _heard)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _alone(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Unless marked `network`: an empty EQAT_CACHE, and an error on any connection beyond this machine."""
    if request.node.get_closest_marker("network"):
        return
    monkeypatch.setenv("EQAT_CACHE", str(tmp_path_factory.getbasetemp() / "eqat-cache"))
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: Any) -> None:
        local = self.family == socket.AF_UNIX or address[0] in ("localhost", "127.0.0.1", "::1")
        if not local:
            raise AssertionError(f"a test without the marker `network` connects to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return Path(__file__).resolve().parents[1]
