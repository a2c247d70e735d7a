"""Which text, and how it is cut into windows: settings only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from eqat_mm.data.hub import PUBLIC
from eqat_mm.data.text.files import SOURCES, TEXT_FIELD
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.settings import Count, Length, Positive, Seed, Settings, Share, shown


@dataclass(frozen=True)
class TextSource(Settings, option="source"):
    """One of several texts.

    Attributes:
        path: where its documents come from.
        weight: its share of the windows, beside the weights of the others.
        text_field: that holds the text, where there are records; null takes that of all.
    """

    path: str
    weight: Positive = 1.0
    text_field: str | None = None


@dataclass(frozen=True)
class TextWindows(Settings, option="data"):
    """Which text, and how it is cut.

    Args:
        source: a file (.txt, .jsonl, .json, .parquet; .gz, .zst), a folder of such files, `hf:NAME[:CONFIG[:SPLIT]]`,
            or a name of `eqat assets`; or several of these with weights, `[{path: texts/, weight: 3}, {path:
            code.jsonl.gz}]`. There is no text by default.
        text_field: field or column that holds the text, where there are records.
        part: `train` or `held_out` side of the split by document, or `all` of them.
        length: tokens in a window.
        begin: what a window begins with: `auto` takes what the tokenizer puts before every text, such as the
            beginning-of-text token of Gemma and Llama 2; `none` is text alone, as in published perplexities of Llama.
        count: number of windows; None takes all the text.
        held_out_fraction: share of the documents held out.
        seed: order of the documents.
        split_seed: which documents are held out; the same for training and evaluation.
    """

    source: str | list[TextSource] | None = None
    text_field: str = TEXT_FIELD
    part: Literal["train", "held_out", "all"] = "train"
    length: Length = 2048
    begin: Literal["auto", "none"] = "auto"
    count: Count | None = None
    held_out_fraction: Share = 0.1
    seed: Seed = 0
    split_seed: Seed = 0

    def check_together(self) -> None:
        """Check that several texts are told as such, and that their windows are counted."""
        if isinstance(self.source, str) and self.source.startswith("[") and not os.path.lexists(self.source):
            raise ConfigError(
                where=f"--{self.option}source",
                given=shown(self.source),
                allowed="a path, or a list of sources with `path`, `weight` and `text_field`",
                do="write it as [{path: texts/, weight: 3}, {path: more.jsonl}]",
            )
        if isinstance(self.source, list) and (not self.source or self.count is None):
            option = f"--{self.option}"
            raise ConfigError(
                where=f"{option}source",
                given=f"{len(self.source)} sources" + (" and no count" if self.source else ""),
                allowed="one source, or several that share a number of windows by their weights",
                do=f"name sources, and a number with {option}count",
            )

    @property
    def sources(self) -> list[TextSource]:
        """The texts, each with its field."""
        given = self.source if isinstance(self.source, list) else [TextSource(self.source or "")]
        return [replace(each, text_field=each.text_field or self.text_field) for each in given]

    def require_source(self, option: str) -> None:
        """Check that text is named, before any work.

        Args:
            option: that names it, for the message.

        Raises:
            ConfigError: none is.
        """
        if self.source is None:
            raise ConfigError(option, "no text", f"{SOURCES}, such as {' or '.join(PUBLIC)}", f"name one with {option}")


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Return how many of `total` things each weight gets: as near to its share as whole numbers are."""
    exact = [weight / sum(weights) * total for weight in weights]
    whole = [int(share) for share in exact]
    left = sorted(range(len(exact)), key=lambda index: whole[index] - exact[index])
    for index in left[: total - sum(whole)]:
        whole[index] += 1
    return whole
