"""Committed progress of a block-wise run: what a killed run continues from."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eqat_mm.blocks.walker import BlockWalker
from eqat_mm.runtime.files import append_jsonl, read_json, write_json, write_jsonl
from eqat_mm.runtime.provenance import require_same_config


@dataclass
class RunState:
    """Blocks that are done, and the streams behind the last of them.

    Attributes:
        folder: run folder.
        config: resolved configuration; a run continues only under the same one.
        records: metrics of every committed block.
    """

    folder: Path
    config: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Number of committed blocks."""
        return len(self.records)

    @classmethod
    def open(cls, folder: Path, config: dict[str, Any]) -> RunState:
        """Start in an empty folder, or take up the run that is in it.

        Raises:
            ConfigError: the folder holds a run with another configuration.
        """
        path = folder / "state.json"
        if not path.is_file():
            state = cls(folder, config)
        else:
            saved = read_json(path)
            require_same_config(saved["config"], config, str(path))
            state = cls(folder, config, saved["records"])
        write_jsonl(folder / "metrics.jsonl", state.records)
        return state

    def commit(self, walker: BlockWalker, record: dict[str, Any]) -> None:
        """Save both streams, then the JSON that makes them count, then drop the previous ones."""
        previous = self._streams()
        self.records.append(record)
        fp, quantized = self._streams()
        walker.fp.save(fp)
        walker.quantized.save(quantized)
        write_json(self.folder / "state.json", {"config": self.config, "records": self.records})
        append_jsonl(self.folder / "metrics.jsonl", record)
        for path in previous:
            path.unlink(missing_ok=True)

    def restore(self, walker: BlockWalker) -> None:
        """Bring the streams of `walker` to the end of the last committed block."""
        if 0 < self.done < len(walker):
            fp, quantized = self._streams()
            walker.fp.restore(fp)
            walker.quantized.restore(quantized)

    def clean(self) -> None:
        """Remove the streams of a finished run."""
        shutil.rmtree(self.folder / "streams", ignore_errors=True)
        shutil.rmtree(self.folder / "spool", ignore_errors=True)

    def _streams(self) -> tuple[Path, Path]:
        folder = self.folder / "streams"
        return folder / f"fp-{self.done:05d}.bin", folder / f"quantized-{self.done:05d}.bin"
