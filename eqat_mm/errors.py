"""Errors a user can cause and mend: each says where, what was given, what is allowed, what to do.

Invariants of our own code are `assert`s; everything a user can trigger is one of these classes,
so the command line prints four lines instead of a traceback.
"""

from __future__ import annotations

import errno
import re


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

    @property
    def kind(self) -> str:
        """Name of the error that a user is told: the nearest one of this module."""
        return next(each.__name__ for each in type(self).__mro__ if each.__module__ == __name__)

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
    """Not enough disk or memory for the job, or a disk that refuses what it is asked."""


class TrainingError(EqatError):
    """Training that stopped making sense (non-finite loss) after every bounded retry."""


_SYSTEM = {
    errno.ENOSPC: ("a disk with room for what the job writes", "free disk space, then start the same command again"),
    errno.EDQUOT: ("room within your quota", "free disk space, then start the same command again"),
    errno.EFBIG: ("files of any size", "raise the limit (ulimit -f), or choose another file system"),
    errno.EROFS: ("a place that can be written", "choose another --output"),
    errno.EACCES: ("a file or folder that you may read or write", "change its permissions, or name another"),
    errno.EPERM: ("a file or folder that you may read or write", "change its permissions, or name another"),
    errno.ENOTDIR: ("a path of folders", "name another path: a part of this one is a file"),
    errno.EISDIR: ("a file", "name another path: this one is a folder"),
    errno.EEXIST: ("a path that is free", "name another path: this one is taken"),
    errno.ENOENT: ("a path that exists", "check the path"),
    errno.ENAMETOOLONG: ("a shorter name", "name another path"),
    errno.ELOOP: ("a path without circular links", "name another path"),
    errno.EIO: ("a disk that works", "check the disk; the same command continues from what was saved last"),
    errno.ESTALE: ("a file system that answers", "mount it again; the same command continues from what was saved last"),
    errno.EMFILE: ("more open files", "raise the limit (ulimit -n)"),
}
"""What the system may refuse: what it would take, and what to do."""


_IN_WORDS = (
    (re.compile(r"\(os error (\d+)\)"), None),  # safetensors
    (re.compile(r"\d+ requested and \d+ written"), errno.ENOSPC),  # numpy, which does not say why
    (re.compile(r"inline_container|PytorchStreamWriter"), errno.ENOSPC),  # nor does torch
    (re.compile(r"Symlink loop"), errno.ELOOP),  # Path.resolve
)
"""Errors of the system as libraries tell them that write files themselves."""


def explained_system_error(error: Exception) -> ResourceError | None:
    """Return an error of the system, or what a library made of it, as one of ours; None for any other error."""
    number = error.errno if isinstance(error, OSError) and error.errno else _number_in(str(error))
    if number not in _SYSTEM:
        return None
    allowed, do = _SYSTEM[number]
    given = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return ResourceError(str(getattr(error, "filename", None) or "disk"), given, allowed, do)


def _number_in(words: str) -> int:
    for pattern, number in _IN_WORDS:
        if found := pattern.search(words):
            return int(found[1]) if number is None else number
    return 0
