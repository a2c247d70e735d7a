"""`eqat generate`: what a model writes, about images where there are some."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from eqat_eval.generation import GeneratedText, generate_about_images, generate_text
from eqat_eval.graphed_decode import CudaGraph
from eqat_mm.checkpoint.folders import load_processor, load_tokenizer, takes_images
from eqat_mm.commands.models import load_model, model_folder, require_model
from eqat_mm.data.images import ImageFile, read_image
from eqat_mm.data.problems import BadSample
from eqat_mm.errors import ConfigError, DataError
from eqat_mm.runtime.device import best_device
from eqat_mm.runtime.precision import Precision
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.settings import Count, PositiveOrZero, Seed, Settings, Within


@dataclass(frozen=True)
class GenerateJob(Settings):
    """Write text.

    Attributes:
        model: packed checkpoint, model folder, alias or hub repository.
        prompt: text to continue, or to answer with `chat` or `image`.
        image: files of images that the prompt is about, for a vision-language model; they come before it in the
            model's chat template. Several: --image '[a.png, b.png]'.
        chat: put the prompt through the model's chat template.
        max_new_tokens: most tokens to write.
        temperature: 0 is greedy.
        top_p: nucleus of the sampling.
        seed: of the sampling.
        dtype: of what is not quantized, and of matrix products; `auto` takes bfloat16 on a GPU, float32 on a CPU.
        device: cpu, cuda, cuda:N, or auto.
        cuda_graph: replay decode steps from a CUDA graph; `auto` does so on a GPU and says where it cannot.
    """

    model: str = "smollm2-135m"
    prompt: str = "The capital of France is"
    image: tuple[Path, ...] | Path = ()
    chat: bool = False
    max_new_tokens: Count = 64
    temperature: PositiveOrZero = 0.0
    top_p: Annotated[float, Within(0, 1, without=(0,))] = 1.0
    seed: Seed = 0
    dtype: Precision = "auto"
    device: str = "auto"
    cuda_graph: CudaGraph = "auto"


def generate(job: GenerateJob) -> str:
    """Generate text, streamed to standard output.

    Raises:
        EqatError: any bad input.
    """
    folder = model_folder(job.model)
    require_model(folder)
    paths = job.image if isinstance(job.image, tuple) else (job.image,)
    if paths and not takes_images(folder):
        raise ConfigError(
            where="--image",
            given=f"{len(paths)} images for {job.model}, which reads text only",
            allowed="a vision-language model, such as llava-1.5-7b",
            do="leave --image out, or choose a vision-language model",
        )
    images = [_read(path) for path in paths]
    through_processor = bool(images) or (job.chat and takes_images(folder))
    written = _written(job, folder, images, through_processor=through_processor)
    say(f"[{written.tokens} tokens, {written.tokens_per_second:.1f} tokens/s]")
    return written.text


def _written(job: GenerateJob, folder: Path, images: list[Any], *, through_processor: bool) -> GeneratedText:
    settings: dict[str, Any] = {
        "temperature": job.temperature,
        "top_p": job.top_p,
        "seed": job.seed,
        "stream": True,
        "cuda_graph": job.cuda_graph,
    }
    if through_processor:
        processor = load_processor(folder)
        model = load_model(folder, best_device(job.device), job.dtype)
        return generate_about_images(model, processor, job.prompt, images, job.max_new_tokens, **settings)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, best_device(job.device), job.dtype)
    return generate_text(model, tokenizer, job.prompt, job.max_new_tokens, chat=job.chat, **settings)


def _read(path: Path) -> Any:
    """Return an image in mode RGB.

    Raises:
        DataError: it is missing or unreadable.
    """
    try:
        return read_image(ImageFile(path))
    except BadSample as error:
        raise DataError("--image", str(error), "an image file that Pillow can read", "check the path") from error
