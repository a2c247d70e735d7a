"""Where a run keeps what, and which paths are its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RECORD, REPLACED = "run.json", ".replaced"
_PROGRESS = ("trainer", "streams")
_KEPT = ("model", "state.json", "metrics.jsonl", "samples.safetensors", "result.json", "lmms-eval")
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
