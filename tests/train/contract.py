"""Stopped runs and whole ones, many in one process, or in each of those that a launcher started.

    python -m torch.distributed.run --nproc_per_node 2 tests/train/contract.py FOLDER llava:lora:zero-2 ...

A case is a family, what is trained, and how processes share it. Each leaves in `FOLDER/PROCESSES/CASE`:

    whole.pt        losses and weights of a run that nothing stopped
    stopped/        a run that was stopped in its fifth step, for others to continue
    again.pt        losses and weights of the same, continued here
    continued.pt    those of one that another number of processes stopped, if that is there already
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import pytest
import torch
from torch import distributed

from eqat_mm.commands.line.recipes import deepspeed_path
from eqat_mm.runtime.device import processes
from tests.train.cases import cases_in, losses_of, trained_of
from tests.train.launched import forget_settings
from tests.train.stopping import Stopped, stop_at_step

STEPS = 6
STOPPED_AT = 5
BATCH: dict[str, Any] = {"batch_size": 1, "global_batch": 4}
"""Four forwards of a step in one process, two in each of two."""


@dataclass(frozen=True)
class Contract:
    """One case, in one place.

    Attributes:
        folder: for models and runs of all cases.
        family: as in `cases_in`.
        trains: as in `cases_in`.
        kind: `plain`, or a stage of ZeRO.
    """

    folder: Path
    family: str
    trains: str
    kind: str

    @classmethod
    def of(cls, folder: Path, name: str) -> Contract:
        """The case of a name."""
        return cls(folder, *name.split(":"))

    @property
    def name(self) -> str:
        return f"{self.family}:{self.trains}:{self.kind}"

    def place(self, world: int) -> Path:
        """Where so many processes leave what they make."""
        return self.folder / str(world) / self.name

    def result(self, world: int, name: str) -> dict[str, Any]:
        """Return losses and weights of a run."""
        found: dict[str, Any] = torch.load(self.place(world) / f"{name}.pt")
        return found

    def play(self) -> None:
        """Make all that `FOLDER/PROCESSES/CASE` holds."""
        place, world = self.place(processes()), processes()
        self.train(place / "runs" / "whole", "whole")
        with pytest.MonkeyPatch.context() as patch:
            stop_at_step(patch, (STOPPED_AT - 1) * BATCH["global_batch"] // world + 1)
            with pytest.raises(Stopped):
                self.train(place / "stopped", "")
        for left, name in ((place / "stopped", "again"), (self.place(3 - world) / "stopped", "continued")):
            if left.is_dir():
                self.copy(left, place / "runs" / name)
                self.train(place / "runs" / name, name)

    def train(self, run: Path, name: str) -> None:
        """Train, or go on with, a run; the first process saves its result."""
        forget_settings()
        case = cases_in(self.folder / "models", self.family, self.trains)
        how = {} if self.kind == "plain" else {"deepspeed": str(deepspeed_path(self.kind))}
        model = case.make()
        log = case.train(model, run, **BATCH, **(how if processes() > 1 else {}))
        if first():
            torch.save({"losses": losses_of(log), "weights": trained_of(model)}, self.place(processes()) / f"{name}.pt")

    def copy(self, source: Path, target: Path) -> None:
        """Copy a run, once."""
        if first():
            shutil.copytree(source, target)
        if processes() > 1:
            distributed.barrier()


def first() -> bool:
    """Whether this is the first process."""
    return processes() == 1 or distributed.get_rank() == 0


if __name__ == "__main__":
    for argument in sys.argv[2:]:
        Contract.of(Path(sys.argv[1]), argument).play()
