"""Committed progress of a block-wise run: what a killed run continues from.

A block is committed when its shard is written and the JSON says so, with the hash of the shard. How the streams get
behind the last committed block again is a choice:

    recompute   they are not kept. The tokens pass the finished blocks once more: the FP stream the full-precision ones,
                the quantized stream the packed ones as their shards hold them.
    files       they are kept in files behind that block, which were on the disk before the JSON.

Of several ranks each keeps the streams of its samples in a folder of its own, and the first writes all else. Files that
are damaged, or of another number of ranks, are of no use: then the tokens pass the finished blocks once more here, too.
A shard that is damaged ends what counts: its block is trained again.
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
from eqat_mm.errors import CheckpointError
from eqat_mm.runtime.files import append_jsonl, checksum_of, sha256_of, write_jsonl
from eqat_mm.runtime.progress import progress, say
from eqat_mm.runtime.ranks import ALONE, Ranks
from eqat_mm.runtime.sealed import read_sealed, write_sealed

Sums = dict[str, list[str]]
"""Checksums of the two committed streams of each rank, by the name of its folder."""


@dataclass
class Committed:
    """What state.json holds.

    Attributes:
        records: metrics of every committed block.
        shards: SHA-256 of their shards.
        streams: checksums of the streams behind the last of them, where they are kept.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    streams: Sums = field(default_factory=dict)

    def whole(self, writer: CheckpointWriter) -> Committed:
        """Return what counts of it: the blocks before the first shard that is not what it was."""
        for index, expected in enumerate(self.shards):
            shard = writer.shard(index)
            if not shard.is_file() or sha256_of(shard) != expected:
                say(f"{shard} is not what was committed: the run goes on from block {index + 1}")
                return Committed(self.records[:index], self.shards[:index])
        return self


class RunState:
    """Blocks that are done, and the streams behind the last of them.

    Args:
        folder: run folder.
        writer: of the checkpoint.
        keeps_streams: whether streams are committed as files.
        ranks: processes that share the run.

    Raises:
        CheckpointError: state.json is damaged.
    """

    def __init__(self, folder: Path, writer: CheckpointWriter, *, keeps_streams: bool, ranks: Ranks = ALONE) -> None:
        self.folder, self.writer, self.keeps_streams, self.ranks = folder, writer, keeps_streams, ranks
        self.committed: Committed = ranks.from_first(self._take_up)
        self._drop_uncommitted()
        ranks.barrier()

    @property
    def done(self) -> int:
        """Number of committed blocks."""
        return len(self.committed.records)

    @property
    def streams(self) -> Path:
        """Folder of this rank's committed streams, and of live ones on disk."""
        return self._streams_of(self.ranks.rank)

    @property
    def digests(self) -> dict[Path, str]:
        """SHA-256 of every committed shard, by path."""
        return {self.writer.shard(index): digest for index, digest in enumerate(self.committed.shards)}

    def commit(self, walker: BlockWalker, record: dict[str, Any], shard: str) -> None:
        """Save what is kept of the streams, then the JSON that makes the block count; then drop what no longer does.

        Args:
            walker: behind the block.
            record: its metrics.
            shard: SHA-256 of its shard; only the first rank's counts.
        """
        self.committed.records.append(record)
        self.committed.shards.append(shard)
        if self.keeps_streams:
            fp, quantized = self._committed()
            walker.fp.save(fp)
            walker.quantized.save(quantized)
        self.committed.streams = self._sums()
        self.ranks.barrier()  # every rank has passed the block and kept what it keeps
        if self.ranks.rank == 0:
            write_sealed(self.folder / "state.json", vars(self.committed))
            append_jsonl(self.folder / "metrics.jsonl", record)
        self.ranks.barrier()  # only now it counts
        if self.keeps_streams:
            self._drop_uncommitted()

    def restore(self, walker: BlockWalker) -> None:
        """Bring the streams of `walker`, which stand at the first block, behind the last committed one."""
        if not 0 < self.done < len(walker):
            return
        if self.keeps_streams and self._have_files():
            fp, quantized = self._committed()
            walker.fp.restore(fp)
            walker.quantized.restore(quantized)
        else:
            self._recompute(walker)

    def clean(self) -> None:
        """Remove the streams of a finished run."""
        if self.ranks.rank == 0:
            shutil.rmtree(self.folder / "streams", ignore_errors=True)

    def _take_up(self) -> Committed:
        path, found = self.folder / "state.json", Committed()
        if path.is_file():
            found = _read(path, len(self.writer.opened.blocks)).whole(self.writer)
        self._drop_of_other_numbers()
        write_jsonl(self.folder / "metrics.jsonl", found.records)
        return found

    def _recompute(self, walker: BlockWalker) -> None:
        steps, writer = walker.walk(stop=self.done), self.writer
        for step in progress(steps, what="finished blocks, once more", total=self.done, unit="block"):
            walker.advance_fp(step)
            load_block(writer.shard(step.index), walker.opened, step.name, step.block, writer.spec, walker.device)
            walker.advance_quantized(step)
            self._drop_all_but(walker.fp.path, walker.quantized.path)

    def _have_files(self) -> bool:
        """Whether the committed files of all ranks are there, and are what was committed."""
        same = all(self.ranks.gathered(self._sums() == self.committed.streams))
        if not same:
            say(f"no whole streams of {self.ranks.world} process(es) in {self.folder}: they are computed again")
        return same

    def _sums(self) -> Sums:
        """Return the checksums of the committed streams that all ranks keep."""
        paths = self._committed() if self.keeps_streams else ()
        own = [checksum_of(path) if path.is_file() else "missing" for path in paths]
        names = [self._streams_of(rank).name for rank in range(self.ranks.world)]
        return {name: sums for name, sums in zip(names, self.ranks.gathered(own), strict=True) if sums}

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


def _read(path: Path, blocks: int) -> Committed:
    """Return what state.json holds.

    Raises:
        CheckpointError: something else than a run of so many blocks writes.
    """
    value = read_sealed(path)
    found = Committed(**value) if value.keys() == vars(Committed()).keys() else None
    if found is None or not len(found.records) == len(found.shards) <= blocks:
        raise CheckpointError(
            where=str(path),
            given="progress of another kind of run",
            allowed=f"that of a model of {blocks} blocks, as this version writes it",
            do="begin anew with --overwrite, or give another --output",
        )
    return found
