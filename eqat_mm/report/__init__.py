"""One page about a run: what was asked, what came of it, and what nobody has recorded."""

from eqat_mm.report.found import Found, find
from eqat_mm.report.page import Answers, write_report

__all__ = ["Answers", "Found", "find", "write_report"]
