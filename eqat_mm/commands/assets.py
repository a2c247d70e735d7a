"""`eqat assets`: models and data that have a short name."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from eqat_mm.errors import ConfigError
from eqat_mm.runtime.files import cache_folder
from eqat_mm.runtime.plugins import CONVERSATIONS, MODELS, TEXTS, package_of, plugged, plugged_function
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.settings import Settings, shown
from llava_adapters.aliases import ALIASES

_GROUPS = {MODELS: "models", TEXTS: "texts", CONVERSATIONS: "conversations about images"}


@dataclass(frozen=True)
class AssetsJob(Settings):
    """List the short names of models and data, or fetch what some of them stand for.

    Attributes:
        fetch: names, each made ready for use: fetched, verified, converted. Empty lists what there is.
    """

    fetch: tuple[str, ...] = ()


def assets(job: AssetsJob) -> None:
    """List or fetch.

    Raises:
        ConfigError: an unknown name, or its package cannot be imported.
        DataError: a failed download, or a hash that differs.
    """
    for name in job.fetch:
        group = _group_of(name)
        brought = plugged_function(group, name)()
        say(f"{name}: {f'{len(brought):,} documents' if group == TEXTS else brought}")
    if not job.fetch:
        _list()


def _group_of(name: str) -> str:
    found = next((group for group in _GROUPS if name in plugged(group)), None)
    if found is None:
        names = [name for group in _GROUPS for name in plugged(group)]
        raise ConfigError(
            where="--fetch",
            given=shown(name),
            allowed=", ".join(names) or "nothing: no installed package brings models or data",
            do="choose one; models of the hub are fetched when they are first used",
        )
    return found


def _list() -> None:
    for group, what in _GROUPS.items():
        if names := plugged(group):
            say(f"{what} (kept in {cache_folder()}):")
            for name, entry in names.items():
                about = (inspect.getdoc(plugged_function(group, name)) or "").partition("\n\n")[0]
                say(f"  {name:<22} {' '.join(about.split())} [{package_of(entry)}]")
    say("models of the hub:")
    for alias, repository in ALIASES.items():
        say(f"  {alias:<22} {repository}")
