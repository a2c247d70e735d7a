"""What an adapter must fulfil, as checks of its tiny model that need no test framework.

A check is a function of a `Case`. Its docstring's first line says what holds; it raises an `EqatError` where that does
not hold, and `NotHere` where the adapter declares nothing of the kind.
"""

from eqat_mm.contract.case import Case, NotHere
from eqat_mm.contract.checks import CHECKS, Outcome, outcomes

__all__ = ["CHECKS", "Case", "NotHere", "Outcome", "outcomes"]
