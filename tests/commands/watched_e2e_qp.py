"""`eqat e2e-qp` as on a GPU, and it says which dtypes the kernels saw.

The processor answers DeepSpeed as a GPU would, and what is not trained is bfloat16.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from eqat_mm.cli import run_command
from eqat_mm.commands.verbs import tune
from tests.train.seen import answer_as_on_cuda, watch_kernels

if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        answer_as_on_cuda(patch)
        patch.setattr(tune, "frozen_dtype", lambda precision, device: torch.bfloat16)
        seen = watch_kernels(patch)
        status = run_command("e2e-qp", sys.argv[1:])
    print(f"kernels saw {sorted(map(str, seen))}")
    sys.exit(status)
