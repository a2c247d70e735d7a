"""Conversations about images: what a model is trained on and asked, against what its processor gives it in use."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from eqat_eval.shared_images import obstacle, read_fronts
from eqat_mm.contract.case import ANOTHER_ROUTE, Case, NotHere, difference
from eqat_mm.contract.structure import SEES
from eqat_mm.data.image_text.batching import Collator
from eqat_mm.data.image_text.chat import IGNORED, Chat
from eqat_mm.data.image_text.columns import alone, taken_apart
from eqat_mm.data.image_text.conversations import IMAGE, Conversation, Turn
from eqat_mm.data.image_text.prefix import filling_of, has_prefix
from eqat_mm.data.image_text.processors import fit_processor
from eqat_mm.data.image_text.prompt import Renderer
from eqat_mm.data.image_text.style import Style, apply_style

_SIZES = ((40, 30), (30, 50))
"""Widths and heights of the images that are shown, in pixels."""


def inputs(case: Case) -> None:
    """Samples of training are what the processor makes of the same conversation, and give the same logits."""
    processor, model = _speaking(case)
    chat, collate = Chat(processor), Collator(processor.tokenizer, filling=filling_of(processor))
    samples = [chat.encode(_conversation(count), _images(count)) for count in (0, 1, 2)]
    together = _logits(model, collate(samples))
    for count, sample in enumerate(samples):
        used = _as_used(processor, chat, count)
        length = used["input_ids"].shape[1]
        expected = _logits(model, used)[0]
        trained = _logits(model, collate([sample]))[0, :length]
        row = together[count][collate(samples)["attention_mask"][count].bool()][:length]
        same = torch.equal(sample["input_ids"][:length], used["input_ids"][0])
        case.require(same, f"other tokens for {count} images", "those of the processor", _DO)
        _require_labels(case, chat, sample, count)
        _require_suffix(case, processor, sample, count)
        for name, found in (("alone", trained), ("in a batch", row)):
            error = difference(found, expected)
            case.require(
                error < ANOTHER_ROUTE,
                f"logits that differ by {error:.1e} for {count} images, {name}",
                "what the model predicts in use",
                f"{_DO}; the processor gives {', '.join(used)}, training {', '.join(sample)}",
            )


@torch.no_grad()
def questions(case: Case) -> None:
    """Images that several questions are about may be read once for all of them."""
    processor, model = _speaking(case)
    if (reason := obstacle(model)) is not None:
        raise NotHere(f"they are read for every question: {reason}")
    renderer = Renderer(processor)
    asked = [(renderer.asked(text, count), _images(count)) for count in (1, 2) for text in ("w5", "w6 w7 w8")]
    rows = [renderer.inputs(renderer.text([turn], answering=True), images) for turn, images in asked]
    fronts = read_fronts(model, rows, processor.image_token_id, partial(_together, processor))
    if fronts.read is None:
        raise NotHere("they are read for every question: its tokens are of several kinds")
    rests = _together(processor, fronts.rests(rows), "right")
    found = model(**fronts.for_forward(rests)).logits
    for row, read, found_RV in zip(rows, fronts.lengths, found, strict=True):
        expected_RV = _logits(model, alone(row))[0, read:]
        error = difference(found_RV[: len(expected_RV)], expected_RV)
        case.require(
            error < ANOTHER_ROUTE,
            f"logits that differ by {error:.1e} where images were read before the question",
            "those of the whole prompt",
            "let `obstacle` in eqat_eval.shared_images say what its tokens see or count besides those before them",
        )


def _speaking(case: Case) -> tuple[Any, Any]:
    """Return the processor and the model of an adapter that sees."""
    if case.arch.auto_class != SEES:
        raise NotHere("a language model")
    if case.arch.processor is None:
        raise NotHere("the adapter has no `processor` for its tiny model")
    if find_spec("PIL") is None or find_spec("torchvision") is None:
        raise NotHere("what reads images is not installed: pip install 'eqat-mm[vlm]'")
    processor, model = case.arch.processor(), case.model()
    apply_style(processor, Style())
    fit_processor(processor, model.config)
    return processor, model


def _together(processor: Any, rows: list[Any], side: str) -> dict[str, Tensor]:
    return Collator(processor.tokenizer, side)(rows)


_DO = "compare the sample of eqat_mm.data.image_text.chat.Chat.encode with what the processor returns"


def _require_labels(case: Case, chat: Chat, sample: dict[str, Tensor], count: int) -> None:
    """Check that the answers are what is learned, and that the tokens of images are counted as they are written."""
    labels, conversation = sample["labels"], _conversation(count)
    found = chat.tokenizer.decode(labels[labels != IGNORED]).split()
    words = [word for word in found if word in " ".join(turn.text for turn in conversation.turns)]
    said = " ".join(text for place, text in enumerate(_SPOKEN) if place % 2 and place >= _first_learned(chat))
    case.require(words == said.split(), f"labels {found}", f"the answers {said}", _DO)
    sizes = [(height, width) for width, height in _SIZES[:count]]
    (length,) = chat.lengths([chat.text(conversation)], [sizes])
    case.require(
        length == len(labels), f"{length} tokens counted, {len(labels)} there, for {count} images", "all of them", _DO
    )


def _require_suffix(case: Case, processor: Any, sample: dict[str, Tensor], count: int) -> None:
    """Check that what is learned is what a processor gives that is told the answer by itself."""
    if not count or not has_prefix(processor):
        return
    text = processor.apply_chat_template(_messages(count, len(_SPOKEN) - 1))
    told = processor(text=[text], suffix=[_SPOKEN[-1]], images=_images(count), images_kwargs={"return_tensors": "pt"})
    for name, row in told.items():
        same = torch.equal(alone(sample)[name], torch.as_tensor(row))
        case.require(same, f"other {name} for {count} images", "those with `suffix`", _DO)


_SPOKEN = (" w5 w6", "w7 w8", "w9", "w10")


def _first_learned(chat: Chat) -> int:
    """Return the place of the first answer that is learned."""
    return len(_SPOKEN) - 1 if has_prefix(chat.processor) else 1


def _conversation(images: int) -> Conversation:
    spoken = (IMAGE * images + _SPOKEN[0], *_SPOKEN[1:])
    turns = tuple(Turn(("user", "assistant")[place % 2], text) for place, text in enumerate(spoken))
    return Conversation("contract", turns, tuple(range(images)))  # type: ignore[arg-type]


def _images(count: int) -> list[Any]:
    from PIL import Image

    draw = torch.Generator().manual_seed(4)
    pixels = [torch.randint(0, 256, (height, width, 3), generator=draw) for width, height in _SIZES[:count]]
    return [Image.fromarray(each.to(torch.uint8).numpy()) for each in pixels]


def _as_used(processor: Any, chat: Chat, images: int) -> dict[str, Tensor]:
    """Return what the processor makes of the conversation up to the first answer to be learned, as in generation."""
    turns = _first_learned(chat)
    if not images and has_prefix(processor):  # which takes no text without one
        renderer = Renderer(processor)
        prompt = renderer.text(_conversation(images).turns[:turns], answering=True)
        return alone(renderer.inputs(prompt))
    text = processor.apply_chat_template(_messages(images, turns), add_generation_prompt=True)
    given = {"images": _images(images), "images_kwargs": {"return_tensors": "pt"}} if images else {}
    return alone(taken_apart(processor(text=[text], **given), type(processor).__name__))


def _messages(images: int, turns: int) -> list[dict[str, Any]]:
    """Return the first turns of the conversation as templates take them."""
    content: list[list[dict[str, str]]] = [[{"type": "text", "text": text}] for text in _SPOKEN[:turns]]
    content[0] = [{"type": "image"}] * images + content[0]
    return [{"role": ("user", "assistant")[place % 2], "content": each} for place, each in enumerate(content)]


@torch.no_grad()
def _logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**{k: v for k, v in given.items() if k != "labels"}, use_cache=False).logits
    return logits
