"""`eqat generate`: what a model writes, about images where there are some."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eqat_eval.generation import GeneratedText, generate_about_images, generate_text
from eqat_eval.prompts import encode_prompt
from eqat_mm.checkpoint.folders import load_tokenizer, takes_images
from eqat_mm.checkpoint.speaker import load_speaker
from eqat_mm.commands.plumbing.models import load_model, model_folder, require_weights
from eqat_mm.commands.plumbing.speaking import Speaking
from eqat_mm.data.image_text.addresses import image_at
from eqat_mm.data.image_text.conversations import IMAGE
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.device import best_device
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.settings import Count

ANSWER, CONTINUATION = 512, 64
"""Most tokens to write by default: an answer ends by itself."""


@dataclass(frozen=True)
class GenerateJob(Speaking):
    """Write text.

    Attributes:
        model: packed checkpoint, model folder, alias or hub repository.
        prompt: text to continue, or to answer with `chat`, `system` or `image`.
        image: image that the prompt is about, for a vision-language model; several may follow, and it may be given
            again. A file, `data:image/png;base64,...`, or an address with `allow_network`. They come where the prompt
            has `<image>`, or before it.
        chat: put the prompt through the model's chat template.
        max_new_tokens: most tokens to write. Default: 512 for an answer, 64 for a continuation.
    """

    model: str
    prompt: str = "The capital of France is"
    image: list[str] | str = field(default_factory=list)
    chat: bool = False
    max_new_tokens: Count | None = None


def generate(job: GenerateJob) -> str:
    """Generate text, streamed to standard output.

    Raises:
        EqatError: any bad input.
    """
    folder = model_folder(job.model)
    require_weights(folder)
    addresses = [job.image] if isinstance(job.image, str | Path) else job.image
    sees = takes_images(folder)
    if addresses and not sees:
        raise text_only("--image", f"{len(addresses)} images for {job.model}, which reads text only")
    images = [image_at(str(address), allow_network=job.allow_network) for address in addresses]
    asks = bool(images) or job.chat or job.system is not None
    written = _written(job, folder, images, asks=asks, through_processor=sees and (asks or IMAGE in job.prompt))
    say(f"[{written.tokens} tokens, {written.tokens_per_second:.1f} tokens/s]")
    return written.text


def text_only(where: str, given: str) -> ConfigError:
    """Return the error for images where a model reads text only."""
    allowed = "a vision-language model, such as llava-1.5-7b"
    return ConfigError(where, given, allowed, "leave --image out, or choose a vision-language model")


def _written(
    job: GenerateJob, folder: Path, images: list[Any], *, asks: bool, through_processor: bool
) -> GeneratedText:
    chat = asks or through_processor
    speaker: Any = load_speaker(folder, job.style) if through_processor else load_tokenizer(folder)
    encode_prompt(speaker, job.prompt, images, chat=chat, system=job.system)  # refused before the model is read
    model = load_model(folder, best_device(job.device), job.dtype)
    most = job.max_new_tokens or (ANSWER if chat else CONTINUATION)
    if through_processor:
        return generate_about_images(model, speaker, job.prompt, images, most, stream=True, **job.decoding)
    return generate_text(model, speaker, job.prompt, most, chat=chat, stream=True, **job.decoding)
