"""Answers for `eqat report`: the same questions to the full-precision model and to every checkpoint made of it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from eqat_eval.generation import generate_about_images, generate_text
from eqat_eval.prompts import encode_prompt
from eqat_mm.checkpoint.folders import load_tokenizer, takes_images
from eqat_mm.checkpoint.speaker import load_speaker
from eqat_mm.commands.generate import text_only
from eqat_mm.commands.models import load_model, model_folder, require_weights
from eqat_mm.data.addresses import image_at
from eqat_mm.data.style import Style
from eqat_mm.errors import ConfigError, DataError
from eqat_mm.report import Answers, Found
from eqat_mm.runtime.device import best_device
from eqat_mm.runtime.precision import Precision
from eqat_mm.runtime.progress import say

_QUESTIONS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Name three animals that can fly.",
    "Write a short poem about the sea.",
    "What is 17 plus 25?",
    "Translate into French: Good morning, my friend.",
    "Why do leaves fall in autumn?",
    "What is the difference between a virus and a bacterium?",
)
_ABOUT_IMAGES = ("What is in this picture?", "Which colours are in this picture?", "Describe the picture in detail.")
_WIDEST = 480  # pixels of an image on the page


@dataclass(frozen=True)
class Asked:
    """What is asked.

    Attributes:
        questions: one after the other, from the beginning again; empty takes our own.
        images: addresses, one for each question, from the beginning again.
        count: number of questions.
        max_new_tokens: most tokens of an answer.
        device: to compute on.
        dtype: of what is not quantized.
    """

    questions: tuple[str, ...]
    images: Sequence[str] | str
    count: int
    max_new_tokens: int
    device: str
    dtype: Precision

    @property
    def addresses(self) -> list[str]:
        """Images as a list."""
        return [self.images] if isinstance(self.images, str) else list(self.images)

    @property
    def words(self) -> list[str]:
        """So many questions as are to be asked."""
        own = _ABOUT_IMAGES if self.addresses else _QUESTIONS
        return list(islice(cycle(self.questions or own), self.count))


def questions_in(path: Path | None) -> tuple[str, ...]:
    """Return the lines of a file, empty ones left out; none without a file.

    Raises:
        DataError: it cannot be read, or has no question.
    """
    if path is None:
        return ()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--questions {path}", f"{error}", "a text file in UTF-8", "check the path") from error
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise DataError(f"--questions {path}", "no question", "one question a line", "write some into the file")
    return found


def answers_of(found: Found, asked: Asked) -> list[Answers]:
    """Ask every model, one loaded after the other.

    Raises:
        EqatError: the full-precision model cannot be found, or a question cannot be asked of it.
    """
    models = list(_models(found))
    folder = models[0][1]
    require_weights(folder)
    images = [image_at(address) for address in asked.addresses]
    if images and not takes_images(folder):
        raise text_only("--image", f"{len(images)} images for {folder}, which reads text only")
    shown = list(islice(cycle(images), asked.count)) if images else [None] * asked.count
    written = [_written(title, folder, asked, shown) for title, folder in models]
    pictures = [() if image is None else (_address(image),) for image in shown]
    titles = [title for title, _ in models]
    rows = zip(asked.words, pictures, zip(*written, strict=True), strict=True)
    return [Answers(words, picture, tuple(zip(titles, texts, strict=True))) for words, picture, texts in rows]


def _models(found: Found) -> Iterator[tuple[str, Path]]:
    """Yield title and folder of the full-precision model and of every checkpoint."""
    made = [stage for stage in found.stages if stage.manifest is not None]
    if not made:
        raise ConfigError(
            where="--samples",
            given=f"no checkpoint in {found.root} yet",
            allowed="a run that has made one",
            do="finish a run first, or leave --samples out",
        )
    assert made[-1].manifest is not None
    yield "full precision", model_folder(made[-1].manifest.source)
    yield from ((f"{stage.title} ({stage.name})", stage.model) for stage in made)


def _written(title: str, folder: Path, asked: Asked, images: Sequence[Any]) -> list[str]:
    say(f"answers: {title}")
    sees = takes_images(folder)
    speaker: Any = load_speaker(folder, Style()) if sees else load_tokenizer(folder)
    chat = sees or bool(getattr(speaker, "chat_template", None))
    for words, image in zip(asked.words, images, strict=True):  # refused before the model is read
        encode_prompt(speaker, words, [] if image is None else [image], chat=chat)
    model = load_model(folder, best_device(asked.device), asked.dtype)
    if sees:
        pairs = [(words, [] if image is None else [image]) for words, image in zip(asked.words, images, strict=True)]
        return [generate_about_images(model, speaker, *pair, asked.max_new_tokens).text for pair in pairs]
    return [generate_text(model, speaker, words, asked.max_new_tokens, chat=chat).text for words in asked.words]


def _address(image: Any) -> str:
    """Return an image as an address that holds it, no wider than it is shown."""
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((_WIDEST, _WIDEST))
    small.save(file, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
