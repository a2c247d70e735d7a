"""Numbers of a run on a dashboard: TensorBoard or Weights & Biases, both optional packages."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from eqat_mm.errors import ConfigError
from eqat_mm.runtime.progress import speaks

ReportTo = Literal["none", "tensorboard", "wandb"]


class Reporter:
    """Takes the numbers of a run; this one keeps none."""

    def begin(self, step: int) -> None:
        """Begin, or go on behind a step: what an earlier start has reported of later ones comes again."""

    def add(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Report what of `numbers` is a finite number, at a step."""

    def close(self, *, whole: bool) -> None:
        """Send what is left; `whole` where the run has come to its end."""


SILENT = Reporter()
"""Nothing is reported."""


def require_reporter(kind: ReportTo) -> None:
    """Check that the package of a dashboard is installed, and that it will take a run.

    Raises:
        ConfigError: it is not, or it wants to know who reports.
    """
    if kind == "none":
        return
    found = find_spec(kind)
    if found is None or found.origin is None:  # a folder of this name, such as W&B leaves, is no package
        raise _refused(kind, f"the package {kind} is not installed", f"pip install {kind}")
    if kind == "wandb" and speaks() and os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun"):
        import wandb

        with _told():
            wandb.login()


@contextmanager
def reported(kind: ReportTo, folder: Path, settings: Mapping[str, Any]) -> Iterator[Reporter]:
    """Give what takes the numbers of a run, in the process that talks to the user; a run that goes on is the same.

    Args:
        kind: of dashboard; its package is installed.
        folder: of the run, which names it.
        settings: of the run.

    Raises:
        ConfigError: the dashboard does not take it.
    """
    if kind == "none" or not speaks():
        yield SILENT
        return
    found, whole = _TensorBoard(folder) if kind == "tensorboard" else _WandB(folder, settings), False
    try:
        yield found
        whole = True
    finally:
        found.close(whole=whole)


@contextmanager
def _told() -> Iterator[None]:
    """Turn what W&B raises into four lines."""
    import wandb

    try:
        yield
    except wandb.Error as error:
        said = " ".join(str(error).split())[:200]
        raise _refused("wandb", said, "wandb login, set WANDB_MODE=offline") from error


def _refused(kind: str, given: str, cure: str) -> ConfigError:
    return ConfigError(
        where=f"--report_to {kind}",
        given=given,
        allowed="none, tensorboard or wandb; metrics.jsonl in the run folder has the same numbers",
        do=f"{cure}, or leave --report_to out",
    )


class _TensorBoard(Reporter):
    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._writer: Any = None

    def begin(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def add(self, step: int, numbers: Mapping[str, Any]) -> None:
        for name, value in _finite(numbers).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, *, whole: bool) -> None:
        if self._writer is not None:
            self._writer.close()


class _WandB(Reporter):
    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        place = folder.resolve()
        with _told():
            self._run: Any = wandb.init(
                project="eqat-mm",
                name="-".join(place.parts[-2:]),
                id=hashlib.sha256(str(place).encode()).hexdigest()[:16],
                resume="allow",
                dir=str(folder),
                config=dict(settings),
            )

    def add(self, step: int, numbers: Mapping[str, Any]) -> None:
        if step >= self._run.step:  # it keeps what it was told of a step by an earlier start
            self._run.log(_finite(numbers), step=step)

    def close(self, *, whole: bool) -> None:
        self._run.finish(exit_code=0 if whole else 1)


def _finite(numbers: Mapping[str, Any]) -> dict[str, float]:
    kept = {name: value for name, value in numbers.items() if isinstance(value, int | float) and name != "step"}
    return {name: float(value) for name, value in kept.items() if math.isfinite(value)}
