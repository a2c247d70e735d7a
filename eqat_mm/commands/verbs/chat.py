"""`eqat chat`: a conversation with a model, line by line, about images where it sees."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqat_eval.dialogue import Dialogue
from eqat_eval.prompts import encode_prompt
from eqat_mm.checkpoint.folders import load_tokenizer, takes_images
from eqat_mm.checkpoint.speaker import load_speaker
from eqat_mm.commands.plumbing.models import load_model, model_folder, require_weights
from eqat_mm.commands.plumbing.speaking import Speaking
from eqat_mm.commands.verbs.generate import ANSWER, text_only
from eqat_mm.data.image_text.addresses import image_at
from eqat_mm.errors import DataError, EqatError
from eqat_mm.runtime.device import best_device
from eqat_mm.runtime.progress import complain, say
from eqat_mm.runtime.settings import Count
from eqat_mm.runtime.signals import Stopped

_HELP = "/image PATH shows an image, /reset begins anew, /quit ends; all else is said to the model"


@dataclass(frozen=True)
class ChatJob(Speaking):
    """Talk with a model: one message a line, from the keyboard or a pipe.

    Attributes:
        model: packed checkpoint, model folder, alias or hub repository.
        quantized: packed checkpoint to talk with in place of `model`.
        max_new_tokens: most tokens of an answer.
    """

    model: str
    quantized: Path | None = None
    max_new_tokens: Count = ANSWER


def chat(job: ChatJob) -> None:
    """Answer what is typed until `/quit` or the end of the input.

    Raises:
        EqatError: a bad model, or settings that do not suit it. What a line does wrong is said, and the chat goes on.
    """
    folder = model_folder(str(job.quantized or job.model))
    require_weights(folder)
    sees = takes_images(folder)
    speaker: Any = load_speaker(folder, job.style) if sees else load_tokenizer(folder)
    encode_prompt(speaker, "Hello", chat=True, system=job.system)  # refused before the model is read
    model = load_model(folder, best_device(job.device), job.dtype)
    dialogue = Dialogue(model, speaker, job.max_new_tokens, **job.decoding)
    say(f"talking with {folder}: {_HELP}")
    talk(dialogue, _lines(), sees=sees, allow_network=job.allow_network)


def talk(dialogue: Dialogue, lines: Iterator[str], *, sees: bool, allow_network: bool) -> None:
    """Answer lines on standard output; what is wrong with one is said on standard error."""
    for line in lines:
        command, _, rest = line.rstrip().partition(" ")
        if command == "/quit":
            return
        try:
            _heed(dialogue, line.strip(), command, rest.strip(), sees=sees, allow_network=allow_network)
        except EqatError as error:
            complain(f"{error.kind}\n{error}")


def _heed(dialogue: Dialogue, line: str, command: str, rest: str, *, sees: bool, allow_network: bool) -> None:
    if command == "/image":
        if not rest:
            raise DataError("/image", "no image", "/image PATH", "say which one")
        if not sees:
            raise text_only("/image", f"{rest:.60} for a model that reads text only")
        dialogue.show(image_at(rest, allow_network=allow_network, where="/image"))
        say("[the next message is about it]")
    elif command == "/reset":
        dialogue.reset()
        say("[forgotten]")
    elif command == "/help":
        say(_HELP)
    elif command.startswith("/"):
        raise DataError("eqat chat", f"{command:.40}", "/image, /reset, /quit, /help", "put a space before text with /")
    elif line:
        _answer(dialogue, line)


def _answer(dialogue: Dialogue, line: str) -> None:
    """Write an answer; Ctrl-C ends it, and what was asked is forgotten."""
    try:
        dialogue.ask(line, stream=True)
    except Stopped:
        raise
    except KeyboardInterrupt:
        say("\n[stopped; this message is forgotten]")


def _lines() -> Iterator[str]:
    """Yield what is typed, or what comes through a pipe."""
    if sys.stdin is None:  # a process may have none
        return
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text is refused by itself
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401  # lets `input` edit lines

    while True:
        try:
            yield input("> ")
        except EOFError:
            say("")  # what is printed next begins a line
            return
