"""The processor of a model folder in the style in which its model is addressed, and the files that keep this style.

A packed checkpoint holds what its run used. `auto` is therefore decided once, where a full-precision folder is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from eqat_mm.checkpoint.companions import files_like
from eqat_mm.checkpoint.folders import is_packed, load_processor, load_tokenizer, takes_images
from eqat_mm.data.processors import fit_processor, set_padding
from eqat_mm.data.style import AUTO, MODEL, Style, apply_style, image_settings, template_text
from eqat_mm.data.text_speaker import TextSpeaker
from eqat_mm.errors import CheckpointError, ConfigError
from eqat_mm.runtime.files import read_json_object, write_text
from eqat_mm.runtime.progress import say

_PROCESSOR, _IMAGES = "processor_config.json", "preprocessor_config.json"


def load_speaker(folder: Path, style: Style | None = None) -> Any:
    """Return the processor of a vision-language model, which agrees with its model.

    Args:
        folder: of the model, packed or not.
        style: how the model is addressed; `auto` by default.

    Raises:
        CheckpointError: there is no processor.
        ConfigError: it contradicts the model, or cannot address it in this way.
    """
    wanted = style or Style()
    processor, chosen = _styled(folder, wanted)
    found = [
        f"{name} {value}" for name, value in vars(chosen).items() if getattr(wanted, name) == AUTO and value != MODEL
    ]
    if found:
        say(f"as this model was trained: {', '.join(found)} ({MODEL} takes what its own files say)")
    fit_processor(processor, transformers.AutoConfig.from_pretrained(folder))
    return processor


def load_listener(folder: Path, style: Style | None = None) -> Any:
    """Return what renders the conversations that a model learns from: see `load_speaker`, and `TextSpeaker`.

    Args:
        folder: of a model, packed or not, language or vision-language.
        style: how the model is addressed; `auto` by default.

    Raises:
        CheckpointError: there is no processor, or no tokenizer.
        ConfigError: it contradicts the model, or cannot address it in this way.
    """
    if takes_images(folder):
        return load_speaker(folder, style)
    found = TextSpeaker(load_tokenizer(folder))
    apply_style(found, _text_style(folder, style or Style()))
    set_padding(found.tokenizer, transformers.AutoConfig.from_pretrained(folder))
    return found


def _text_style(folder: Path, style: Style) -> Style:
    """Return the style of a language model: a template that is named, or its own.

    Raises:
        ConfigError: something is to become of images.
    """
    if style.stored.images != MODEL:
        raise ConfigError(
            f"images {style.images}", f"{folder}, which sees none", f"{AUTO} or {MODEL}", "leave it out: there are none"
        )
    return style.stored


def restyled(folder: Path, style: Style | None = None) -> dict[str, str | None]:
    """Return the files in which a model addressed in a style differs from the one in `folder`, by name.

    Args:
        folder: of a model, packed or not.
        style: how the model is addressed; `auto` by default.

    Returns:
        Their contents; None for one that is not to be there.

    Raises:
        ConfigError: no such template, or images that its processor cannot treat so.
        CheckpointError: a style is asked for, and there is no processor.
    """
    wanted = _wanted(folder, style or Style())
    if wanted == Style(MODEL, MODEL):
        return {}
    if not takes_images(folder):
        template = _text_style(folder, wanted).template
        return {} if template == MODEL else _template_files(folder, template_text(template))
    try:
        processor, chosen = _styled(folder, wanted)
    except CheckpointError as error:
        if wanted != Style():
            raise
        if files_like(folder, ["chat_template*", "*processor_config.json"]):
            say(f"template and images stay those of {folder}: {error.given}")
        return {}
    files = {} if chosen.template == MODEL else _template_files(folder, processor.chat_template)
    return files if chosen.images == MODEL else files | _image_files(folder, files, image_settings(chosen.images))


def style_digest(processor: Any) -> str:
    """Return a hash of how a processor addresses its model: template and settings of images."""
    settings = processor.image_processor.to_json_string()
    return hashlib.blake2b(f"{processor.chat_template}\n{settings}".encode(), digest_size=8).hexdigest()


def write_over(folder: Path, files: Mapping[str, str | None]) -> None:
    """Write files into a folder, or remove those that are not to be there."""
    for name, text in files.items():
        if text is None:
            (folder / name).unlink(missing_ok=True)
        else:
            write_text(folder / name, text)


def _styled(folder: Path, style: Style) -> tuple[Any, Style]:
    processor = load_processor(folder)
    return processor, apply_style(processor, _wanted(folder, style))


def _wanted(folder: Path, style: Style) -> Style:
    return style.stored if is_packed(folder) else style


def _template_files(folder: Path, template: str) -> dict[str, str | None]:
    """Return the one file of the template, without those that would be read in its place."""
    files: dict[str, str | None] = {"chat_template.jinja": template}
    if (folder / "chat_template.json").is_file():
        files["chat_template.json"] = None
    stored = _stored(folder, _PROCESSOR, {})
    if stored.pop("chat_template", None) is not None:
        files[_PROCESSOR] = _json(stored)
    return files


def _image_files(folder: Path, files: Mapping[str, str | None], settings: dict[str, Any]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    if (folder / _IMAGES).is_file():
        found[_IMAGES] = _json(_stored(folder, _IMAGES, files) | settings)
    whole = _stored(folder, _PROCESSOR, files)
    if "image_processor" in whole:
        found[_PROCESSOR] = _json(whole | {"image_processor": whole["image_processor"] | settings})
    return found


def _stored(folder: Path, name: str, files: Mapping[str, str | None]) -> dict[str, Any]:
    if (text := files.get(name)) is not None:
        return dict(json.loads(text))
    return read_json_object(folder / name) if (folder / name).is_file() else {}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
