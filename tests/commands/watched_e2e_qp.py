"""`scripts/e2e_qp.py` that says which dtypes the kernels saw, on a processor that answers DeepSpeed as a GPU would."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from eqat_mm.cli import run_command
from tests.train.seen import answer_as_on_cuda, watch_kernels

if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        answer_as_on_cuda(patch)
        seen = watch_kernels(patch)
        status = run_command("e2e-qp", sys.argv[1:])
    print(f"kernels saw {sorted(map(str, seen))}")
    sys.exit(status)
