"""Numbers of a run on a dashboard: TensorBoard or Weights & Biases, both optional packages."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from eqat_mm.errors import ConfigError
from eqat_mm.runtime.progress import speaks

ReportTo = Literal["none", "tensorboard", "wandb"]


class Reporter:
    """Takes the numbers of a run; this one keeps none."""

    def add(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Report what of `numbers` is a finite number, at a step."""

    def close(self) -> None:
        """Send what is left."""


SILENT = Reporter()
"""Nothing is reported."""


def require_reporter(kind: ReportTo) -> None:
    """Check that the package of a dashboard is installed.

    Raises:
        ConfigError: it is not.
    """
    if kind != "none" and find_spec(kind) is None:
        raise ConfigError(
            where=f"--report_to {kind}",
            given=f"the package {kind} is not installed",
            allowed="none, tensorboard or wandb; metrics.jsonl in the run folder has the same numbers",
            do=f"pip install {kind}, or leave --report_to out",
        )


def reporter(kind: ReportTo, folder: Path, settings: Mapping[str, Any]) -> Reporter:
    """Return what takes the numbers of a run, in the process that talks to the user; a run that goes on is the same.

    Args:
        kind: of dashboard; its package is installed.
        folder: of the run, which names it.
        settings: of the run.
    """
    if kind == "none" or not speaks():
        return SILENT
    return _TensorBoard(folder) if kind == "tensorboard" else _WandB(folder, settings)


class _TensorBoard(Reporter):
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def add(self, step: int, numbers: Mapping[str, Any]) -> None:
        for name, value in _finite(numbers).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB(Reporter):
    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        place = folder.resolve()
        self._run: Any = wandb.init(
            project="eqat-mm",
            name="-".join(place.parts[-2:]),
            id=hashlib.sha256(str(place).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(folder),
            config=dict(settings),
        )

    def add(self, step: int, numbers: Mapping[str, Any]) -> None:
        self._run.log(_finite(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


def _finite(numbers: Mapping[str, Any]) -> dict[str, float]:
    kept = {name: value for name, value in numbers.items() if isinstance(value, int | float) and name != "step"}
    return {name: float(value) for name, value in kept.items() if math.isfinite(value)}
