"""From the keywords of a function to the job of a command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from transformers.utils import logging

from eqat_mm.commands.resolved import job_of, words_of
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.progress import quietly
from eqat_mm.runtime.settings import Settings

Job = TypeVar("Job", bound=Settings)
Text = str | Path | Sequence[str | Path | Mapping[str, Any]]
"""A file, a folder or hf:NAME; or several, which share the windows by their weights (`{"path": ..., "weight": 3}`)."""


@contextmanager
def said(*, unless: bool) -> Iterator[None]:
    """Let the body say what a command says, unless it is to be quiet; bars of transformers are then hidden, too."""
    bars = logging.is_progress_bar_enabled()
    if unless:
        logging.disable_progress_bar()
    try:
        with quietly(unless):
            yield
    finally:
        if unless and bars:
            logging.enable_progress_bar()


def common(output: str | Path | None, config: str | Path | None, device: str | None, overwrite: bool) -> dict[str, Any]:
    """Return the keywords that quantizing and tuning share, by the names of the options."""
    return {"output": output, "config": config, "device": device, "overwrite": True if overwrite else None}


def job_from(
    command: str,
    kind: type[Job],
    named: Mapping[str, Any],
    *settings: Mapping[str, Any] | None,
    recipes_of: str | None = None,
) -> Job:
    """Return the job of a command as its words give it.

    Args:
        command: its name.
        kind: dataclass of the job.
        named: options by name; None is one that is not given.
        settings: more of them, where None is a value.
        recipes_of: another command, whose recipe is taken.

    Raises:
        ConfigError: an unknown option, one that is given twice, or a value that is not allowed.
    """
    given = {name: value for name, value in named.items() if value is not None}
    return job_of(command, kind, words_of(given, *(each or {} for each in settings)), recipes_of)


def sources_of(text: Text | None) -> Any:
    """Return texts as the option of a source takes them."""
    if text is None or isinstance(text, str | Path):
        return text
    return [each if isinstance(each, Mapping) else {"path": str(each)} for each in text]


def require_no_processor(processor: Any) -> None:
    """Check that no processor is given with a model that is named.

    Raises:
        ConfigError: one is.
    """
    if processor is not None:
        allowed = "with a model in memory; a folder has its own"
        raise ConfigError("processor", "one for a model that is named", allowed, "leave it out")
