"""`eqat generate-data`: training text that the model writes itself."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import transformers

from eqat_eval.repetition import repetition
from eqat_mm.checkpoint.folders import load_tokenizer
from eqat_mm.commands.plumbing.models import load_model, model_folder, require_weights
from eqat_mm.commands.plumbing.runs import asked
from eqat_mm.data.generated.record_parts import (
    SUFFIXES,
    Record,
    RecordFile,
    locked,
    parts_folder,
    read_parts,
    require_writer,
    write_records,
)
from eqat_mm.data.generated.sampling import GeneratedTokens, Sampling, generate_tokens
from eqat_mm.data.text.vocabulary import decoded, start_of, vocabulary_of
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.device import best_device
from eqat_mm.runtime.files import read_json
from eqat_mm.runtime.place import Place
from eqat_mm.runtime.progress import duration, progress, say
from eqat_mm.runtime.run import Run
from eqat_mm.runtime.settings import Count, CountOrZero, Fraction, Length, Seed, Settings

_COMMAND = "generate-data"


@dataclass(frozen=True)
class GenerateDataJob(Settings):
    """Let a model write its own training text.

    Attributes:
        model: model folder, alias or hub repository, in full precision; of a vision-language model, its language
            tower writes.
        output: .jsonl or .parquet file to write. Default: runs/MODEL-generated.jsonl.
        count: number of texts.
        length: most tokens of a text.
        sampling: paper (first token uniform, 3 to 5 greedy, then sampled), random (all sampled) or greedy.
        seed: of all texts.
        batch_size: texts written side by side; does not change them.
        shard: the share of this process, 1/4 to 4/4 where four write one output. A launcher sets it.
        min_tokens: a text that the model ends before so many tokens is degenerate.
        max_repeated: a text is degenerate, it loops, if more than this share of its 4-grams occurred in it before.
        drop_degenerate: leave degenerate texts out of the file; they are counted either way.
        device: what to compute on: cpu, cuda, cuda:N, or auto.
        overwrite: discard what is already in the output.
    """

    model: str
    output: Path | None = None
    count: Count = 512
    length: Length = 1024
    sampling: Sampling = "paper"
    seed: Seed = 0
    batch_size: Count = 16
    shard: str | None = None
    min_tokens: CountOrZero = 16
    max_repeated: Fraction = 0.5
    drop_degenerate: bool = False
    device: str = "auto"
    overwrite: bool = False


def generate_data(job: GenerateDataJob) -> Path:
    """Write the texts, or what is missing of them; return the file, which is there once all are written.

    Raises:
        EqatError: any bad input, before anything is written.
    """
    output = job.output or Path("runs") / f"{Path(job.model).name}-generated.jsonl"
    _require_suffix(output)
    shard, shards = _shard(job)
    folder = model_folder(job.model)
    require_weights(folder)
    tokenizer = load_tokenizer(folder)
    _require_context(folder, job.length + len(start_of(tokenizer)))
    wanted = asked(_COMMAND, job, best_device(job.device), {"model": folder}, quantized=is_quantized(folder))
    with Run.open(Place.beside(output), wanted, overwrite=job.overwrite, shared=not job.overwrite) as run:
        if run.finished:
            say(f"already finished: {output}")
            return output
        model = _loaded(job, folder)
        with locked(run.folder):
            if run.finished_meanwhile():
                return output
            run.begin()
        written = read_parts(run.folder, job.count)
        mine = [index for index in range(job.count) if index % shards == shard - 1 and index not in written]
        _write(job, output, model, tokenizer, mine)
        _finish(job, run)
    return output


def _loaded(job: GenerateDataJob, folder: Path) -> transformers.PreTrainedModel:
    """Return the model that writes, in float32: in 16 bits the batch would decide close draws."""
    if is_quantized(folder):
        say(f"note: {job.model} is quantized; its text is that of the quantized model, not of the one it was made from")
    return load_model(folder, best_device(job.device), "float32")


def _write(
    job: GenerateDataJob,
    output: Path,
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    indices: list[int],
) -> None:
    """Write the texts with these indices to a part of this process."""
    shard, shards = _shard(job)
    part = RecordFile(parts_folder(output), f"{shard}-of-{shards}")
    texts = generate_tokens(
        model,
        vocabulary_of(model, tokenizer),
        indices,
        length=job.length,
        seed=job.seed,
        sampling=job.sampling,
        batch_size=job.batch_size,
    )
    started, tokens = time.monotonic(), 0
    total = len(indices) * (job.length - 1)
    for text in progress(_paced(texts, job.length), what="generate", total=total, unit="token"):
        if text is not None:
            tokens += len(text.token_ids)
            part.add(_record_of(text, tokenizer, job))
    seconds = time.monotonic() - started
    speed = f", {tokens:,} tokens in {duration(seconds)}, {tokens / seconds:.1f} tokens/s" if indices else ""
    say(f"{len(indices):,} texts written here{speed}")


def _paced(texts: Iterator[GeneratedTokens | None], length: int) -> Iterator[GeneratedTokens | None]:
    """Yield what `texts` yields, and for every text as often as if it had the full length, so that an ETA is one."""
    for text in texts:
        yield text
        if text is not None:
            yield from (None for _ in range(length - len(text.token_ids) - text.ended))


def _record_of(text: GeneratedTokens, tokenizer: transformers.PreTrainedTokenizerBase, job: GenerateDataJob) -> Record:
    repeated = repetition(text.token_ids).repeated_4grams
    return {
        "text": decoded(tokenizer, text.token_ids),
        "index": text.index,
        "tokens": len(text.token_ids),
        "ended": text.ended,
        "looped": repeated is not None and repeated > job.max_repeated,
    }


def _ended_early(record: Record, job: GenerateDataJob) -> bool:
    return bool(record["ended"]) and record["tokens"] < job.min_tokens


def _finish(job: GenerateDataJob, run: Run) -> None:
    """Put all texts into the output, if none is missing and no other process has done so."""
    with locked(run.folder):
        if run.finished_meanwhile():
            return
        records = read_parts(run.folder, job.count)
        if len(records) < job.count:
            say(f"{len(records):,} of {job.count:,} texts; whoever writes the last of them writes {run.place.proof}")
            return
        _put_together(job, run, list(records.values()))
        run.finish()


def _put_together(job: GenerateDataJob, run: Run, records: list[Record]) -> None:
    degenerate = [each["looped"] or _ended_early(each, job) for each in records]
    kept = [each for each, bad in zip(records, degenerate, strict=True) if not (bad and job.drop_degenerate)]
    if not kept:
        raise ConfigError(
            where="--drop_degenerate",
            given=f"{len(records):,} texts, all degenerate",
            allowed="a model that writes text which does not loop or end at once",
            do="read some texts without --drop_degenerate, or change --max_repeated or --min_tokens",
        )
    counts = {
        "texts": len(kept),
        "tokens": sum(each["tokens"] for each in kept),
        "looped": sum(each["looped"] for each in records),
        "ended": sum(each["ended"] for each in records),
        "ended_early": sum(_ended_early(each, job) for each in records),
        "dropped": len(records) - len(kept),
    }
    run.note(**counts)
    write_records(run.place.proof, kept)
    say(
        f"{run.place.proof}: {counts['texts']:,} texts, {counts['tokens']:,} tokens; of {len(records):,}, "
        f"{counts['looped']:,} loop, {counts['ended_early']:,} end before {job.min_tokens} tokens, "
        f"{counts['dropped']:,} were dropped"
    )


def _require_suffix(output: Path) -> None:
    if output.suffix not in SUFFIXES:
        raise ConfigError(f"--output {output}", repr(output.suffix), " or ".join(SUFFIXES), "choose one of these")
    if output.is_dir():
        raise ConfigError(f"--output {output}", "a folder", "a file", "give another name")
    require_writer(output)


def _require_context(folder: Path, length: int) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and length > context:
        raise ConfigError(
            where="--length",
            given=f"{length} tokens, what the tokenizer puts before a text included",
            allowed=f"up to {context}, the context of the model",
            do="lower --length",
        )


def _shard(job: GenerateDataJob) -> tuple[int, int]:
    """Return which share this process has, from 1, of how many."""
    launched = int(os.environ.get("RANK", "0")) + 1, int(os.environ.get("WORLD_SIZE", "1"))
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", job.shard or f"{launched[0]}/{launched[1]}")
    shard, shards = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= shard <= shards:
        raise ConfigError("--shard", repr(job.shard), "1/N to N/N for N processes", "write 1/4 for the first of four")
    if job.shard is not None and launched[1] > 1:
        raise ConfigError("--shard", f"{job.shard} under a launcher", "one of the two", "leave --shard out")
    if job.overwrite and shards > 1:
        raise ConfigError(
            where="--overwrite",
            given=f"{shards} processes on one output, each of which would discard what the others write",
            allowed="--overwrite in a single process",
            do="remove the old output by hand, or give another --output",
        )
    return shard, shards


def is_quantized(folder: Path) -> bool:
    """Whether the configuration of a model says so."""
    return "quantization_config" in read_json(folder / "config.json")
