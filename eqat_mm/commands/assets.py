"""`eqat assets`: what can be fetched without a hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eqat_mm.commands.models import model_folder
from eqat_mm.data.assets import ASSETS, asset_cache, fetch_asset
from eqat_mm.data.easy_vqa import easy_vqa_folder
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.settings import Settings
from llava_adapters.aliases import ALIASES


@dataclass(frozen=True)
class AssetsJob(Settings):
    """List the pinned assets and model aliases, or fetch some.

    Attributes:
        fetch: names of assets to fetch and verify; models and easy-vqa are converted, too. Empty lists what there is.
    """

    fetch: tuple[str, ...] = ()


def assets(job: AssetsJob) -> None:
    """List or fetch.

    Raises:
        DataError: unknown asset, failed download, or a hash that differs.
        ConfigError: a package needed for the conversion is missing.
    """
    for name in job.fetch:
        say(f"{name}: {_fetched(name)}")
    if job.fetch:
        return
    say(f"assets (cached in {asset_cache()}):")
    for asset in ASSETS.values():
        say(f"  {asset.name:<18} {asset.description} [{asset.license}]")
    say("model aliases:")
    for alias, target in ALIASES.items():
        say(f"  {alias:<22} {target}")


def _fetched(name: str) -> Path:
    """Return the folder of an asset in the form that the other commands read."""
    if ALIASES.get(name) == f"asset:{name}":
        return model_folder(name)
    return easy_vqa_folder() if name == "easy-vqa" else fetch_asset(name)
