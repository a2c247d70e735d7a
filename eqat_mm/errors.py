"""Errors a user can cause and mend: each says where, what was given, what is allowed, what to do.

Invariants of our own code are `assert`s; everything a user can trigger is one of these classes,
so the command line prints four lines instead of a traceback.
"""

from __future__ import annotations


class EqatError(Exception):
    """Base of all user-facing errors.

    Args:
        where: the file, option, layer or record at fault.
        given: what was found there.
        allowed: what would have been accepted.
        do: the next action, as an imperative sentence.
    """

    def __init__(self, where: str, given: str, allowed: str, do: str) -> None:
        super().__init__(where, given, allowed, do)
        self.where, self.given, self.allowed, self.do = where, given, allowed, do

    def __str__(self) -> str:
        rows = (("where", self.where), ("given", self.given), ("allowed", self.allowed), ("do", self.do))
        return "\n".join(f"  {label + ':':<9}{text}" for label, text in rows)


class ConfigError(EqatError):
    """An option, recipe or combination of settings that cannot work."""


class AdapterError(EqatError):
    """A model or adapter that is unknown, or whose declared paths do not match the model."""


class DataError(EqatError):
    """Text, images or downloaded assets that are missing, unreadable or not enough."""


class CheckpointError(EqatError):
    """A model folder that is missing, incomplete, altered or of a foreign format."""


class ExportError(EqatError):
    """A model that the requested export format cannot represent."""


class ResourceError(EqatError):
    """Not enough disk or memory for the job, found before it starts."""


class TrainingError(EqatError):
    """Training that stopped making sense (non-finite loss) after every bounded retry."""
