"""`eqat check-run`: does a run go as it should? Its own numbers, its plan, and what is published of the same run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from eqat_mm.commands.line.model_config import config_of
from eqat_mm.commands.plumbing.checks import print_checks
from eqat_mm.commands.plumbing.runs import model_fingerprint
from eqat_mm.report import find
from eqat_mm.report.found import Found
from eqat_mm.runtime.settings import Settings
from eqat_mm.verify.checks import Check
from eqat_mm.verify.published import published_checks
from eqat_mm.verify.training import training_checks


@dataclass(frozen=True)
class CheckRunJob(Settings):
    """Compare a run, finished or not, with its plan and with published figures of the same run.

    Attributes:
        run: folder of the run, or the one above several runs of one model.
        json: print what was found as one JSON object, for scripts.
    """

    run: Path = field(kw_only=True)
    json: bool = False


def check_run(job: CheckRunJob) -> list[Check]:
    """Print a line for every check; return what became of them.

    Raises:
        CheckpointError: no run is there; or something is not as it should be.
    """
    return print_checks(
        job.run,
        _checks(find(job.run, model_fingerprint)),
        allowed="a run of which every loss, step and byte is as expected",
        do="see docs/faithful_runs.md for what each check means",
        as_json=job.json,
    )


def _checks(found: Found) -> Iterator[Check]:
    for path, reason in found.unread:
        yield Check(path, False, reason)
    for stage in found.stages:
        config = config_of(str(stage.setting("model"))) or {}
        for check in (*training_checks(stage), *published_checks(stage, config)):
            yield Check(f"{stage.name}: {check.name}", check.passed, check.said)
