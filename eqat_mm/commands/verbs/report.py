"""`eqat report`: one page about a run, or about all runs of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from eqat_mm.commands.plumbing.runs import model_fingerprint
from eqat_mm.commands.verbs.report_answers import Asked, answers_of, questions_in
from eqat_mm.errors import ConfigError
from eqat_mm.report import find, write_report
from eqat_mm.report.charts import require_charts
from eqat_mm.runtime.precision import Precision
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.room import require_writable
from eqat_mm.runtime.settings import Count, CountOrZero, Settings


@dataclass(frozen=True)
class ReportJob(Settings):
    """One HTML file about a run folder, or about the folder above several runs of one model.

    Attributes:
        run: the folder.
        output: HTML file. Default: report.html in the folder.
        samples: questions that full precision and every checkpoint answer; 0 loads no model.
        questions: text file with one question a line. Default: some of our own.
        image: image that questions are about, for a vision-language model; several may follow. The first is for the
            first question, and so on, from the beginning again.
        max_new_tokens: most tokens of an answer.
        dtype: of what is not quantized; `auto` takes bfloat16 on a GPU, float32 on a CPU.
        device: what to answer questions on: cpu, cuda, cuda:N, or auto.
    """

    run: Path = field(kw_only=True)
    output: Path | None = None
    samples: CountOrZero = 0
    questions: Path | None = None
    image: list[str] | str = field(default_factory=list)
    max_new_tokens: Count = 96
    dtype: Precision = "auto"
    device: str = "auto"

    def check_together(self) -> None:
        """Check that what is said of questions is not in vain."""
        if self.samples == 0 and (self.questions is not None or self.image):
            given = "--questions" if self.questions is not None else "--image"
            raise ConfigError(given, "no --samples", "with questions to answer", "add --samples 4, or leave it out")


def report(job: ReportJob) -> Path:
    """Write the page; return its path.

    Raises:
        EqatError: no run is there, a package is missing, or a question cannot be asked.
    """
    require_charts()
    output = job.output or job.run / "report.html"
    found = find(job.run, model_fingerprint)
    require_writable(output.parent)
    asked = Asked(questions_in(job.questions), job.image, job.samples, job.max_new_tokens, job.device, job.dtype)
    write_report(found, output, answers_of(found, asked) if job.samples else None)
    for path, reason in found.unread:
        say(f"not read: {path}: {reason}")
    say(f"report: {output}")
    return output
