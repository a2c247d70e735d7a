"""`eqat generate`: what a model writes, about images where there are some."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import transformers

from eqat_eval.generation import GeneratedText, generate_about_images, generate_text
from eqat_eval.graphed_decode import CudaGraph
from eqat_eval.prompts import encode_prompt
from eqat_mm.checkpoint.folders import load_processor, load_tokenizer, takes_images
from eqat_mm.commands.models import load_model, model_folder, require_weights
from eqat_mm.data.conversations import IMAGE
from eqat_mm.data.images import ImageFile, read_image
from eqat_mm.data.problems import BadSample
from eqat_mm.data.processors import fit_processor
from eqat_mm.errors import ConfigError, DataError
from eqat_mm.runtime.device import best_device
from eqat_mm.runtime.precision import Precision
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.settings import Count, PositiveOrZero, Seed, Settings, Within

_NOT_A_FILE = re.compile(r"(https?|ftp|file|s3|gs|hf):/|data:", re.IGNORECASE)


@dataclass(frozen=True)
class GenerateJob(Settings):
    """Write text.

    Attributes:
        model: packed checkpoint, model folder, alias or hub repository.
        prompt: text to continue, or to answer with `chat` or `image`.
        image: file of an image that the prompt is about, for a vision-language model; give it again for several. They
            come where the prompt has `<image>`, or before it.
        chat: put the prompt through the model's chat template.
        max_new_tokens: most tokens to write.
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
    require_weights(folder)
    paths = [job.image] if isinstance(job.image, str | Path) else job.image
    sees = takes_images(folder)
    if paths and not sees:
        raise ConfigError(
            where="--image",
            given=f"{len(paths)} images for {job.model}, which reads text only",
            allowed="a vision-language model, such as llava-1.5-7b",
            do="leave --image out, or choose a vision-language model",
        )
    images = [_read(path) for path in paths]
    written = _written(job, folder, images, through_processor=sees and bool(images or job.chat or IMAGE in job.prompt))
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
    speaker: Any = load_processor(folder) if through_processor else load_tokenizer(folder)
    if through_processor:
        fit_processor(speaker, transformers.AutoConfig.from_pretrained(folder))
    encode_prompt(speaker, job.prompt, images, chat=through_processor or job.chat)  # refused before the model is read
    model = load_model(folder, best_device(job.device), job.dtype)
    if through_processor:
        return generate_about_images(model, speaker, job.prompt, images, job.max_new_tokens, **settings)
    return generate_text(model, speaker, job.prompt, job.max_new_tokens, chat=job.chat, **settings)


def _read(path: str) -> Any:
    """Return an image in mode RGB.

    Raises:
        DataError: it is missing or unreadable, or no file.
    """
    if _NOT_A_FILE.match(str(path)):
        raise DataError("--image", f"{path!s:.60}", "the path of a file", "fetch the image, and give its path")
    try:
        return read_image(ImageFile(Path(path)))
    except BadSample as error:
        raise DataError("--image", str(error), "an image file that Pillow can read", "check the path") from error
