"""Committed progress of a block-wise run: what a killed run continues from.

A block is committed when its shard is written and the JSON says so. How the streams get behind the last committed block
again is a choice:

    recompute   they are not kept. The tokens pass the finished blocks once more: the FP stream the full-precision ones,
                the quantized stream the packed ones as their shards hold them.
    files       they are kept in files behind that block, which were on the disk before the JSON.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eqat_mm.blocks.spool import FP, QUANTIZED, stream_path
from eqat_mm.blocks.walker import BlockWalker
from eqat_mm.checkpoint.read import load_block
from eqat_mm.checkpoint.write import CheckpointWriter
from eqat_mm.runtime.files import append_jsonl, read_json, write_json, write_jsonl
from eqat_mm.runtime.progress import progress
from eqat_mm.runtime.provenance import require_same_config


@dataclass
class RunState:
    """Blocks that are done, and the streams behind the last of them.

    Attributes:
        folder: run folder.
        config: resolved configuration; a run continues only under the same one.
        keeps_streams: whether streams are committed as files.
        records: metrics of every committed block.
    """

    folder: Path
    config: dict[str, Any]
    keeps_streams: bool
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Number of committed blocks."""
        return len(self.records)

    @property
    def streams(self) -> Path:
        """Folder of committed streams, and of live ones on disk."""
        return self.folder / "streams"

    @classmethod
    def open(cls, folder: Path, config: dict[str, Any], *, keeps_streams: bool) -> RunState:
        """Start in an empty folder, or take up the run that is in it.

        Raises:
            ConfigError: the folder holds a run with another configuration.
        """
        path = folder / "state.json"
        state = cls(folder, config, keeps_streams)
        if path.is_file():
            saved = read_json(path)
            require_same_config(saved["config"], config, str(path))
            state.records = saved["records"]
        state._drop_uncommitted()
        write_jsonl(folder / "metrics.jsonl", state.records)
        return state

    def commit(self, walker: BlockWalker, record: dict[str, Any]) -> None:
        """Save what is kept of the streams, then the JSON that makes the block count; then drop what no longer does."""
        self.records.append(record)
        if self.keeps_streams:
            fp, quantized = self._committed()
            walker.fp.save(fp)
            walker.quantized.save(quantized)
        write_json(self.folder / "state.json", {"config": self.config, "records": self.records})
        append_jsonl(self.folder / "metrics.jsonl", record)
        if self.keeps_streams:
            self._drop_uncommitted()

    def restore(self, walker: BlockWalker, writer: CheckpointWriter) -> None:
        """Bring the streams of `walker`, which stand at the first block, behind the last committed one."""
        if not 0 < self.done < len(walker):
            return
        if self.keeps_streams:
            fp, quantized = self._committed()
            walker.fp.restore(fp)
            walker.quantized.restore(quantized)
        else:
            self._recompute(walker, writer)

    def clean(self) -> None:
        """Remove the streams of a finished run."""
        shutil.rmtree(self.streams, ignore_errors=True)

    def _recompute(self, walker: BlockWalker, writer: CheckpointWriter) -> None:
        steps = walker.walk(stop=self.done)
        for step in progress(steps, what="finished blocks, once more", total=self.done, unit="block"):
            walker.advance_fp(step)
            load_block(writer.shard(step.index), walker.opened, step.name, step.block, writer.spec, walker.device)
            walker.advance_quantized(step)

    def _committed(self) -> tuple[Path, Path]:
        return stream_path(self.streams, FP, self.done), stream_path(self.streams, QUANTIZED, self.done)

    def _drop_uncommitted(self) -> None:
        kept = self._committed() if self.keeps_streams else ()
        for path in self.streams.glob("*"):
            if path not in kept:
                path.unlink()
