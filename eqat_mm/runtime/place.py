"""Where a run keeps what, which paths are its own, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from eqat_mm.errors import ConfigError
from eqat_mm.runtime.files import remove, remove_unfinished
from eqat_mm.runtime.progress import say

RECORD, REPLACED = "run.json", ".replaced"
_PROGRESS = ("trainer", "streams")
_KEPT = (
    "model",
    "state.json",
    "metrics.jsonl",
    "token_weights.json",
    "samples.safetensors",
    "result.json",
    "lmms-eval",
    "tensorboard",
    "wandb",
)
"""Names that runs give to what they write; the first go when a run is finished."""


@dataclass(frozen=True)
class Place:
    """Where a run keeps what.

    Attributes:
        folder: of lock, progress and what is replaced.
        record: JSON file that says what the run is.
        proof: file that is written last: with it, the product is whole.
    """

    folder: Path
    record: Path
    proof: Path

    @classmethod
    def within(cls, folder: Path, proof: str = "model/eqat.json") -> Place:
        """Return the place of a run that has a folder of its own."""
        return cls(folder, folder / RECORD, folder / proof)

    @classmethod
    def beside(cls, file: Path) -> Place:
        """Return the place of a run that makes one file: its folder is hidden and goes when the run is finished."""
        return cls(file.with_name(f".{file.name}.parts"), file.with_name(f"{file.name}.json"), file)

    @property
    def hidden(self) -> bool:
        """Whether the folder holds progress alone."""
        return self.proof.parent == self.folder.parent

    def progress(self) -> list[Path]:
        """Return what goes when the run is finished, or begins anew."""
        if self.hidden:
            return [path for path in self.folder.glob("*") if path.suffix != ".lock" and path.name != REPLACED]
        return [self.folder / name for name in _PROGRESS]

    def own(self) -> list[Path]:
        """Return every path that a run writes to, there or not, but for lock and what is replaced; the record last.

        Where they go one by one, what a kill leaves is known to be a run's, and an unfinished one.
        """
        kept = [self.proof] if self.hidden else [self.folder / name for name in _KEPT]
        return [*kept, *self.progress(), self.record]

    @property
    def name(self) -> Path:
        """What a user calls it."""
        return self.proof if self.hidden else self.folder

    def written(self) -> int:
        """Return the bytes in it."""
        return sum(map(_size, self.own()))

    def require_apart(self, inputs: Iterable[Path]) -> None:
        """Check that no input of the job lies where the run writes.

        Raises:
            ConfigError: one does.
        """
        own = [path.resolve() for path in (*self.own(), self.folder / REPLACED)]
        for given in inputs:
            if any(given.resolve().is_relative_to(path) for path in own):
                raise ConfigError(
                    where=f"--output {self.name}",
                    given=f"a place whose files hold {given}, which the job reads",
                    allowed="a folder of its own",
                    do="choose another --output: the job reads the one and writes the other",
                )

    def require_no_strangers(self) -> None:
        """Check that nothing is there that no run wrote, where there is no record of one.

        Raises:
            ConfigError: something is.
        """
        strangers = [path.name for path in self.own() if path.exists()]
        if strangers:
            raise ConfigError(
                where=f"--output {self.name}",
                given=f"{', '.join(strangers)} without the record of a run ({self.record.name})",
                allowed="a new place, or one where this command was at work before",
                do="give another --output, or remove by hand what is there",
            )

    def set_aside(self) -> None:
        """Keep a finished run until the one that replaces it is finished, too; an unfinished one goes."""
        aside, finished = self.folder / REPLACED, self.proof.is_file()
        if finished:
            remove(aside)
            aside.mkdir()
            say(f"what is replaced is kept in {aside} until the new run is finished")
        for path in self.own():
            if path.exists() and finished:
                path.rename(aside / path.name)
            else:
                remove(path)

    def drop_progress(self) -> None:
        """Remove what is of no use when the run is finished, the one that it replaces, too."""
        for path in (self.folder / REPLACED, *self.progress()):
            remove(path)

    def sweep(self) -> None:
        """Remove the temporary files that killed processes have left."""
        for path in self.own():
            remove_unfinished(path)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
