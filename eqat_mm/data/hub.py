"""Data sets of the Hugging Face hub, or of the local cache: `hf:NAME[:CONFIG[:SPLIT]]`.

The default split is `train`; `hf:NAME::SPLIT` leaves the configuration to the data set. Text is streamed: as much is
fetched as is drawn. A slice, `hf:NAME::train[:1%]`, is loaded whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from eqat_mm.data.text.files import package_missing, readable, text_of
from eqat_mm.data.user_files import printable, told
from eqat_mm.errors import DataError
from eqat_mm.runtime.progress import say, size

HUB_PREFIX = "hf:"
PUBLIC = ("hf:DKYoon/SlimPajama-6B", "hf:allenai/c4:en")
"""Text for calibration that anyone may fetch, in plain files, the first choice first."""


def load_hub(source: str) -> Any:
    """Return the `datasets.Dataset` that `source` names, whole.

    Raises:
        DataError: no data set name, or it cannot be loaded.
        ConfigError: the package `datasets` is not installed.
    """
    return _loaded(source)


def is_slice(source: str) -> bool:
    """Whether a source names a slice of a data set, which cannot be streamed."""
    return "[" in _parse(source)[2]


def shards_of(source: str, field: str) -> list[Callable[[], Iterator[str]]]:
    """Return the shards of a data set of text; what is read of one is fetched, and no more.

    Of a shard that is called, documents come one by one, blank ones among them. The size of all is said.

    Args:
        source: names the data set.
        field: that holds the text.

    Raises:
        DataError: no data set name, or it cannot be loaded.
        ConfigError: the package `datasets` is not installed.
    """
    stream = _loaded(source, streaming=True)
    say(f"text: {source}, {_told_size(stream)}; only what is drawn is fetched")
    return [partial(_documents, stream, index, source, field) for index in range(stream.num_shards)]


def _documents(stream: Any, index: int, source: str, field: str) -> Iterator[str]:
    with readable(source, "a readable data set"):
        for row, record in enumerate(stream.shard(num_shards=stream.num_shards, index=index)):
            yield text_of(record, f"{source}, shard {index}, row {row}", field)


def _told_size(stream: Any) -> str:
    stored = getattr(stream.info, "download_size", None)
    return f"{stream.num_shards:,} shards" + (f", {size(stored)}" if stored else "")


def _loaded(source: str, **options: bool) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise package_missing(source, "datasets") from error
    name, config, split = _parse(source)
    try:
        return datasets.load_dataset(name, config or None, split=split or "train", **options)
    except Exception as error:  # its readers raise what they like
        raise DataError(
            printable(source),
            f"the data set cannot be loaded: {told(error)}",
            "a data set of plain files (no loading script), with a configuration and split that it has",
            f"check the three names and the network, or give a local file, or {' or '.join(PUBLIC)}",
        ) from error


def _parse(source: str) -> tuple[str, str, str]:
    # Not more than three parts: a slice such as train[:1%] has a colon of its own.
    name, config, split = (*source.removeprefix(HUB_PREFIX).split(":", 2), "", "")[:3]
    if not name:
        raise DataError(source, "no data set name", "hf:NAME[:CONFIG[:SPLIT]]", "name the data set")
    return name, config, split
