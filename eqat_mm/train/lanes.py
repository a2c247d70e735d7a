"""Lanes: how the samples of a step are drawn so that several processes have equal parts of it.

A sample stays with the process that holds it. Drawn from all samples, a step of 16 has four from one of eight processes
and none from another, and takes as long as four. Drawn from eight lanes, as process r of n holds every n-th sample, it
has two from each. The order follows from the number of lanes alone, so any number of processes gives the same result.
"""

from __future__ import annotations

from collections.abc import Sequence

from eqat_mm.errors import ConfigError
from eqat_mm.runtime.progress import say


def dealt(samples: Sequence[int], batch_size: int, lanes: int) -> list[list[int]]:
    """Return batches of `samples`, in their order, that take as many from each lane while it has any.

    Args:
        samples: in the order in which they are visited.
        batch_size: samples in a batch, a multiple of `lanes`.
        lanes: sample i is in lane i modulo this.
    """
    queues = [[sample for sample in samples if sample % lanes == lane] for lane in range(lanes)]
    each, longest = batch_size // lanes, max(map(len, queues))
    return [[sample for queue in queues for sample in queue[at : at + each]] for at in range(0, longest, each)]


def require_lanes(batch_size: int, lanes: int, samples: int | None, world: int) -> None:
    """Check that every process has something to do, and that the lanes divide a batch.

    Args:
        batch_size: of all processes together.
        lanes: that it is drawn from.
        samples: for calibration; None where it is not known yet.
        world: number of processes.

    Raises:
        ConfigError: names the setting.
    """
    for where, count in (("--fit.batch_size", batch_size), ("--calibration.count", samples)):
        if count is not None and count < world:
            raise ConfigError(
                where=f"{where}, with {world} processes",
                given=f"{count}, for all processes together",
                allowed=f"{world} or more, one for each process",
                do=f"raise {where}, or start fewer processes",
            )
    if lanes < 1 or batch_size % lanes:
        raise ConfigError(
            where="--fit.lanes",
            given=f"{lanes}, with --fit.batch_size {batch_size}",
            allowed="1 or more, a divisor of --fit.batch_size",
            do="use the number of processes, and a multiple of it for --fit.batch_size",
        )


def say_if_unequal(lanes: int, world: int) -> None:
    """Say how the parts of the processes become equal, where they are not."""
    if lanes % world:
        say(f"note: {world} processes have unequal parts of a step; --fit.lanes {world} would make them equal")
