"""Data sets of the Hugging Face hub, or of the local cache: `hf:NAME[:CONFIG[:SPLIT]]`.

The default split is `train`; `hf:NAME::SPLIT` leaves the configuration to the data set. A large one can be sliced:
`hf:NAME::train[:1%]`.
"""

from __future__ import annotations

from typing import Any

from eqat_mm.data.text_files import package_missing
from eqat_mm.data.user_files import printable, told
from eqat_mm.errors import DataError

HUB_PREFIX = "hf:"
PUBLIC = ("hf:DKYoon/SlimPajama-6B", "hf:allenai/c4:en")
"""Text for calibration that anyone may fetch, in plain files, the first choice first."""


def load_hub(source: str) -> Any:
    """Return the `datasets.Dataset` that `source` names.

    Raises:
        DataError: no data set name, or it cannot be loaded.
        ConfigError: the package `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise package_missing(source, "datasets") from error
    name, config, split = _parse(source)
    try:
        return datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # its readers raise what they like
        raise DataError(
            printable(source),
            f"the data set cannot be loaded: {told(error)}",
            "a data set, configuration and split that the hub or the local cache has",
            "check the three names and the network, or give a local file",
        ) from error


def _parse(source: str) -> tuple[str, str, str]:
    # Not more than three parts: a slice such as train[:1%] has a colon of its own.
    name, config, split = (*source.removeprefix(HUB_PREFIX).split(":", 2), "", "")[:3]
    if not name:
        raise DataError(source, "no data set name", "hf:NAME[:CONFIG[:SPLIT]]", "name the data set")
    return name, config, split
