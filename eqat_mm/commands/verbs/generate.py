"""`eqat generate`: what a model writes, about images where there are some."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from eqat_eval.generation import GeneratedText, generate_about_images, generate_text
from eqat_eval.graphed_decode import CudaGraph
from eqat_eval.prompts import encode_prompt
from eqat_mm.checkpoint.folders import load_tokenizer, takes_images
from eqat_mm.checkpoint.speaker import load_speaker
from eqat_mm.commands.plumbing.models import load_model, model_folder, require_weights
from eqat_mm.data.image_text.addresses import image_at
from eqat_mm.data.image_text.conversations import IMAGE
from eqat_mm.data.image_text.style import AUTO, ImageShape, Style, require_template
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.device import best_device
from eqat_mm.runtime.precision import Precision
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.settings import Count, PositiveOrZero, Seed, Settings, Within

ANSWER, CONTINUATION = 512, 64
"""Most tokens to write by default: an answer ends by itself."""


@dataclass(frozen=True)
class GenerateJob(Settings):
    """Write text.

    Attributes:
        model: packed checkpoint, model folder, alias or hub repository.
        prompt: text to continue, or to answer with `chat`, `system` or `image`.
        image: image that the prompt is about, for a vision-language model; several may follow, and it may be given
            again. A file, `data:image/png;base64,...`, or an address with `allow_network`. They come where the prompt
            has `<image>`, or before it.
        allow_network: fetch images with an http(s) address.
        chat: put the prompt through the model's chat template.
        system: what the system says first, in place of the chat template's own words.
        template: chat template of a vision-language model: `auto` (the one that the model was trained with),
            `vicuna_v1`, `model` (the one in its folder), or the path of a .jinja file.
        images: what becomes of images that are no squares: `pad`, `crop`, `model` (what its folder says), or `auto`
            (what the model was trained with).
        max_new_tokens: most tokens to write. Default: 512 for an answer, 64 for a continuation.
        temperature: 0 is greedy.
        top_p: nucleus of the sampling.
        seed: of the sampling.
        dtype: of what is not quantized, and of matrix products; `auto` takes bfloat16 on a GPU, float32 on a CPU.
        device: cpu, cuda, cuda:N, or auto.
        cuda_graph: replay decode steps from a CUDA graph; `auto` does so on a GPU and says where it cannot.
    """

    model: str
    prompt: str = "The capital of France is"
    image: list[str] | str = field(default_factory=list)
    allow_network: bool = False
    chat: bool = False
    system: str | None = None
    template: str = AUTO
    images: ImageShape = AUTO
    max_new_tokens: Count | None = None
    temperature: PositiveOrZero = 0.0
    top_p: Annotated[float, Within(0, 1, without=(0,))] = 1.0
    seed: Seed = 0
    dtype: Precision = "auto"
    device: str = "auto"
    cuda_graph: CudaGraph = "auto"

    def check_together(self) -> None:
        """Check that the template is there, before anything is read."""
        require_template(self.template, "--template")


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
    settings: dict[str, Any] = {
        "temperature": job.temperature,
        "top_p": job.top_p,
        "seed": job.seed,
        "system": job.system,
        "stream": True,
        "cuda_graph": job.cuda_graph,
    }
    chat = asks or through_processor
    style = Style(job.template, job.images)
    speaker: Any = load_speaker(folder, style) if through_processor else load_tokenizer(folder)
    encode_prompt(speaker, job.prompt, images, chat=chat, system=job.system)  # refused before the model is read
    model = load_model(folder, best_device(job.device), job.dtype)
    most = job.max_new_tokens or (ANSWER if chat else CONTINUATION)
    if through_processor:
        return generate_about_images(model, speaker, job.prompt, images, most, **settings)
    return generate_text(model, speaker, job.prompt, most, chat=chat, **settings)
