"""The demo LLaVA that answers mini-VQA."""

from __future__ import annotations

from pathlib import Path

from eqat_demo.llava.build import folder_of_parts

NAME = "demo-llava-mini-vqa"
PARTS = Path(__file__).parent / "llava_parts"


def demo_llava_mini_vqa_folder(cache: Path | None = None) -> Path:
    """A small LLaVA around SmolLM2-135M, trained on mini-VQA (Apache-2.0), assembled on the first call.

    Args:
        cache: folder of all assets, instead of `asset_cache()`.

    Raises:
        DataError: the language model cannot be fetched.
    """
    return folder_of_parts(PARTS, NAME, cache)
