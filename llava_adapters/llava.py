"""LLaVA-1.5: a CLIP vision tower, a projector and a language tower, which alone is quantized."""

from eqat_mm.blocks.arch import Arch
from llava_adapters.llama import NORMS, STAGES, SUMS
from llava_adapters.tiny import tiny_llava
from llava_adapters.tiny_processor import tiny_processor

FULL_PRECISION = (
    "model.vision_tower",
    "model.multi_modal_projector",
    "model.language_model.embed_tokens",
    "model.language_model.norm",
    "lm_head",
)

ARCH = Arch(
    name="llava",
    model_types=("llava",),
    auto_class="AutoModelForImageTextToText",
    blocks="model.language_model.layers",
    stages=STAGES,
    sums=SUMS,
    norms=NORMS,
    projector="model.multi_modal_projector",
    full_precision=FULL_PRECISION,
    tiny=lambda: tiny_llava("llama"),
    processor=tiny_processor,
)
"""The declaration; see docs/adding_a_model.md."""
