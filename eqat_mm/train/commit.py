"""Committed progress of a block-wise run: what a killed run continues from.

A block is committed when its shard is written and the JSON says so. How the streams get behind the last committed block
again is a choice:

    recompute   they are not kept. The tokens pass the finished blocks once more: the FP stream the full-precision ones,
                the quantized stream the packed ones as their shards hold them.
    files       they are kept in files behind that block, which were on the disk before the JSON.

Of several ranks each keeps the streams of its samples in a folder of its own, and the first writes all else. Files of
another number of ranks hold other samples: then the tokens pass the finished blocks once more here, too.
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
from eqat_mm.runtime.progress import progress, say
from eqat_mm.runtime.provenance import require_same_config
from eqat_mm.runtime.ranks import ALONE, Ranks


@dataclass
class RunState:
    """Blocks that are done, and the streams behind the last of them.

    Attributes:
        folder: run folder.
        config: resolved configuration; a run continues only under the same one.
        keeps_streams: whether streams are committed as files.
        records: metrics of every committed block.
        ranks: processes that share the run.
    """

    folder: Path
    config: dict[str, Any]
    keeps_streams: bool
    records: list[dict[str, Any]] = field(default_factory=list)
    ranks: Ranks = ALONE

    @property
    def done(self) -> int:
        """Number of committed blocks."""
        return len(self.records)

    @property
    def streams(self) -> Path:
        """Folder of this rank's committed streams, and of live ones on disk."""
        return self._streams_of(self.ranks.rank)

    @classmethod
    def open(cls, folder: Path, config: dict[str, Any], *, keeps_streams: bool, ranks: Ranks = ALONE) -> RunState:
        """Start in an empty folder, or take up the run that is in it.

        Raises:
            ConfigError: the folder holds a run with another configuration.
        """
        state = cls(folder, config, keeps_streams, ranks=ranks)
        state.records = ranks.from_first(state._take_up)
        state._drop_uncommitted()
        ranks.barrier()
        return state

    def _take_up(self) -> list[dict[str, Any]]:
        path, records = self.folder / "state.json", []
        if path.is_file():
            saved = read_json(path)
            require_same_config(saved["config"], self.config, str(path))
            records = saved["records"]
        self._drop_of_other_numbers()
        write_jsonl(self.folder / "metrics.jsonl", records)
        return list(records)

    def commit(self, walker: BlockWalker, record: dict[str, Any]) -> None:
        """Save what is kept of the streams, then the JSON that makes the block count; then drop what no longer does."""
        self.records.append(record)
        if self.keeps_streams:
            fp, quantized = self._committed()
            walker.fp.save(fp)
            walker.quantized.save(quantized)
        self.ranks.barrier()  # every rank has passed the block and kept what it keeps
        if self.ranks.rank == 0:
            write_json(self.folder / "state.json", {"config": self.config, "records": self.records})
            append_jsonl(self.folder / "metrics.jsonl", record)
        self.ranks.barrier()  # only now it counts
        if self.keeps_streams:
            self._drop_uncommitted()

    def restore(self, walker: BlockWalker, writer: CheckpointWriter) -> None:
        """Bring the streams of `walker`, which stand at the first block, behind the last committed one."""
        if not 0 < self.done < len(walker):
            return
        if self.keeps_streams and self._have_files():
            fp, quantized = self._committed()
            walker.fp.restore(fp)
            walker.quantized.restore(quantized)
        else:
            self._recompute(walker, writer)

    def clean(self) -> None:
        """Remove the streams of a finished run."""
        if self.ranks.rank == 0:
            shutil.rmtree(self.folder / "streams", ignore_errors=True)

    def _recompute(self, walker: BlockWalker, writer: CheckpointWriter) -> None:
        steps = walker.walk(stop=self.done)
        for step in progress(steps, what="finished blocks, once more", total=self.done, unit="block"):
            walker.advance_fp(step)
            load_block(writer.shard(step.index), walker.opened, step.name, step.block, writer.spec, walker.device)
            walker.advance_quantized(step)
            self._drop_all_but(walker.fp.path, walker.quantized.path)

    def _have_files(self) -> bool:
        """Whether there are committed files of this number of ranks; one that is missing then is an error."""
        found = sum(self.ranks.gathered(sum(path.is_file() for path in self._committed())))
        if not found:
            say(f"no streams of {self.ranks.world} process(es) in {self.folder}: they are computed again")
        return found > 0

    def _streams_of(self, rank: int) -> Path:
        streams, world = self.folder / "streams", self.ranks.world
        return streams if world == 1 else streams / f"{rank + 1}-of-{world}"

    def _committed(self) -> tuple[Path, Path]:
        return stream_path(self.streams, FP, self.done), stream_path(self.streams, QUANTIZED, self.done)

    def _drop_uncommitted(self) -> None:
        self._drop_all_but(*(self._committed() if self.keeps_streams else ()))

    def _drop_all_but(self, *kept: Path | None) -> None:
        for path in self.streams.glob("*"):
            if path not in kept:
                path.unlink()

    def _drop_of_other_numbers(self) -> None:
        folders = {self._streams_of(rank) for rank in range(self.ranks.world)}
        for path in (self.folder / "streams").glob("*"):
            if path.is_dir() and path not in folders:
                shutil.rmtree(path)
            elif path.is_file() and self.ranks.world > 1:
                path.unlink()
