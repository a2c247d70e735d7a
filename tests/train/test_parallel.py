"""What the Trainer is told about devices and processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers.training_args import ParallelMode

from eqat_mm.train.e2e_qp import E2EQPConfig
from eqat_mm.train.end_to_end import training_arguments
from tests.train.problems import CPU


@pytest.mark.parametrize("index", [0, 1])
def test_several_gpus_without_a_launcher_train_on_the_one_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    """With two GPUs transformers answers two, cuda:0, and `nn.DataParallel`."""
    current: list[torch.device] = []
    for name, answer in {"is_available": lambda: True, "device_count": lambda: 2, "set_device": current.append}.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    arguments = training_arguments(E2EQPConfig(), tmp_path, torch.device("cuda", index))
    assert arguments.n_gpu == 1
    assert arguments.device == current[-1] == torch.device("cuda", index)
    assert arguments.parallel_mode is ParallelMode.NOT_PARALLEL
    AcceleratorState._reset_state(reset_partial_state=True)


def test_packed_integers_are_not_sent_round(tmp_path: Path) -> None:
    assert training_arguments(E2EQPConfig(), tmp_path, CPU).ddp_broadcast_buffers is False
