"""LLaVA-1.6 (LLaVA-NeXT): images in tiles, with a learned end of line; a Mistral or a Llama (Vicuna, Yi) tower."""

from eqat_mm.blocks.arch import Arch
from llava_adapters.llama import NORMS, STAGES, SUMS
from llava_adapters.llava import FULL_PRECISION
from llava_adapters.tiny import tiny_llava_next
from llava_adapters.tiny_processor import tiny_processor

ARCH = Arch(
    name="llava_next",
    model_types=("llava_next",),
    auto_class="AutoModelForImageTextToText",
    blocks="model.language_model.layers",
    stages=STAGES,
    sums=SUMS,
    norms=NORMS,
    projector="model.multi_modal_projector",
    full_precision=(*FULL_PRECISION, "model.image_newline"),
    tiny=lambda: tiny_llava_next("mistral"),
    processor=lambda: tiny_processor("llava_next"),
)
"""The declaration; see docs/adding_a_model.md."""
