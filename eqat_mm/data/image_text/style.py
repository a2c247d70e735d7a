"""How a vision-language model is addressed: its chat template, and what becomes of images that are no squares.

LLaVA-1.5 was trained with the conversation of Vicuna 1.5 (a system prompt, `</s>` between turns) and with images padded
to squares in the mean colour. The folders on the hub have an abridged template and crop images at their centre. `auto`
takes what the model was trained with where a folder is such a one, and what its own files say of any other. PaliGemma's
folders have no template; `auto` gives them one.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

import transformers

from eqat_mm.data.image_text.prefix import has_prefix
from eqat_mm.data.user_files import decode_utf8, read_bytes, shown, user_path
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.settings import Settings

VICUNA_V1, LLAVA_HF, PALIGEMMA = "vicuna_v1", "llava_hf", "paligemma"
TEMPLATES = (VICUNA_V1, LLAVA_HF, PALIGEMMA)
"""Templates that come with this package."""

AUTO: Literal["auto"] = "auto"
MODEL: Literal["model"] = "model"
"""What the files beside the weights say."""

ImageShape = Literal["auto", "pad", "crop", "model"]
"""Of images that are no squares: `pad` adds bars in the mean colour, `crop` keeps the middle."""

_ALLOWED = f"{AUTO}, {', '.join(TEMPLATES)}, {MODEL} (that of the model's folder), or the path of a .jinja file"
_PROBE = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "question"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "answer"}]},
    {"role": "user", "content": [{"type": "text", "text": "more"}]},
]
_HUBS = "USER: <image>\nquestion ASSISTANT: answer USER: more ASSISTANT:"
"""What the folders on the hub make of this, for models that were trained with `vicuna_v1`."""


@dataclass(frozen=True)
class Style(Settings):
    """How a model is addressed.

    Attributes:
        template: `auto`, `model`, a name in `TEMPLATES`, or the path of a .jinja file.
        images: what becomes of images that are no squares.

    Raises:
        ConfigError, DataError: no such template, or no such shape.
    """

    template: str = AUTO
    images: ImageShape = AUTO

    def check_together(self) -> None:
        """Check that the template is there."""
        require_template(self.template, "--template")

    @property
    def stored(self) -> Style:
        """The same of a folder whose files were written for what its model was trained with: `auto` is `model`."""
        return Style(*(MODEL if each == AUTO else each for each in (self.template, self.images)))  # type: ignore[arg-type]


def apply_style(processor: Any, style: Style) -> Style:
    """Let a processor address its model in this way.

    Args:
        processor: of a vision-language model; changed.
        style: what is wanted.

    Returns:
        What was chosen, without `auto`.

    Raises:
        ConfigError: no such template, or images that this processor cannot treat so.
    """
    chosen = _chosen(processor, style)
    if chosen.template != MODEL:
        processor.chat_template = template_text(chosen.template)
    if chosen.images != MODEL:
        processor.image_processor = _shaping(processor.image_processor, chosen.images)
    return chosen


def require_template(template: str, option: str) -> None:
    """Check that there is such a template.

    Raises:
        ConfigError, DataError: there is none; names the option.
    """
    if template not in (AUTO, MODEL):
        template_text(template, option)


def template_text(template: str, option: str = "template") -> str:
    """Return a chat template by its name, or from a file.

    Raises:
        ConfigError: there is no such template.
        DataError: the file cannot be read.
    """
    if template in TEMPLATES:
        return (files("eqat_mm.data.image_text") / "chat_templates" / f"{template}.jinja").read_text(encoding="utf-8")
    if template.endswith(".jinja"):
        path = user_path(template, _ALLOWED)
        return decode_utf8(read_bytes(path, "a chat template"), path)
    raise ConfigError(option, shown(template), _ALLOWED, "choose one of these")


def _chosen(processor: Any, style: Style) -> Style:
    if AUTO not in (style.template, style.images):
        return style
    abridged = is_abridged(processor)
    without = PALIGEMMA if has_prefix(processor) and not processor.chat_template else MODEL
    template = VICUNA_V1 if abridged else without
    images: ImageShape = "pad" if abridged and _crops(processor.image_processor) else MODEL
    return Style(
        template if style.template == AUTO else style.template, images if style.images == AUTO else style.images
    )


def is_abridged(processor: Any) -> bool:
    """Whether a template is that of LLaVA-1.5 on the hub, which leaves out the system prompt and ends of turns."""
    if not getattr(processor, "chat_template", None):
        return False
    try:
        said = processor.apply_chat_template(_PROBE, add_generation_prompt=True, tokenize=False)
    except Exception:  # noqa: BLE001  # a template is a program of the model's
        return False
    return bool(said == _HUBS)


def _crops(images: Any) -> bool:
    """Whether this is the image processor of the hub's LLaVA-1.5, or the one that can pad, too."""
    return type(images).__name__.startswith(("CLIPImageProcessor", "LlavaImageProcessor"))


def image_settings(shape: ImageShape) -> dict[str, Any]:
    """Return the entries of an image processor's settings that let it treat images so."""
    return {"image_processor_type": "LlavaImageProcessor", "do_pad": shape == "pad"}


def _shaping(images: Any, shape: ImageShape) -> Any:
    if not _crops(images):
        raise ConfigError(
            "images",
            f"{shape}, with a {type(images).__name__}",
            f"{MODEL} (what this image processor does), or a model with CLIP's or LLaVA-1.5's image processor",
            "leave it out, or set it to model; LLaVA-1.6 pads its tiles itself",
        )
    return transformers.LlavaImageProcessor.from_dict(images.to_dict() | image_settings(shape))
