"""Conversations about images: what a model is trained on, against what its processor gives it in use."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from eqat_mm.contract.case import ANOTHER_ROUTE, Case, NotHere, difference
from eqat_mm.contract.structure import SEES
from eqat_mm.data.batching import Collator
from eqat_mm.data.chat import Chat
from eqat_mm.data.conversations import IMAGE, Conversation, Turn

_SIZES = ((40, 30), (30, 50))
"""Widths and heights of the images that are shown, in pixels."""


def inputs(case: Case) -> None:
    """Samples of training are what the processor makes of the same conversation, and give the same logits."""
    if case.arch.auto_class != SEES:
        raise NotHere("a language model")
    if case.arch.processor is None:
        raise NotHere("the adapter has no `processor` for its tiny model")
    if find_spec("PIL") is None or find_spec("torchvision") is None:
        raise NotHere("what reads images is not installed: pip install 'eqat-mm[vlm]'")
    processor, model = case.arch.processor(), case.model()
    chat, collate = Chat(processor), Collator(processor.tokenizer)
    samples = [chat.encode(_conversation(count), _images(count)) for count in (0, 1, 2)]
    together = _logits(model, collate(samples))
    for count, sample in enumerate(samples):
        used = _as_used(processor, count)
        length = used["input_ids"].shape[1]
        expected = _logits(model, used)[0]
        trained = _logits(model, collate([sample]))[0, :length]
        row = together[count][collate(samples)["attention_mask"][count].bool()][:length]
        same = torch.equal(sample["input_ids"][:length], used["input_ids"][0])
        case.require(same, f"other tokens for {count} images", "those of the processor", _DO)
        for name, found in (("alone", trained), ("in a batch", row)):
            error = difference(found, expected)
            case.require(
                error < ANOTHER_ROUTE,
                f"logits that differ by {error:.1e} for {count} images, {name}",
                "what the model predicts in use",
                f"{_DO}; the processor gives {', '.join(used)}, training {', '.join(sample)}",
            )


_DO = "compare the sample of eqat_mm.data.chat.Chat.encode with what the processor returns"


def _conversation(images: int) -> Conversation:
    turns = (Turn("user", IMAGE * images + " w5 w6"), Turn("assistant", "w7 w8"))
    return Conversation("contract", turns, tuple(range(images)))  # type: ignore[arg-type]


def _images(count: int) -> list[Any]:
    from PIL import Image

    return [Image.new("RGB", size, (40, 90, 200)) for size in _SIZES[:count]]


def _as_used(processor: Any, images: int) -> dict[str, Tensor]:
    """Return what the processor makes of the conversation up to its answer, as in generation."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": " w5 w6"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    given = {"images": _images(images)} if images else {}
    return dict(processor(text=[text], return_tensors="pt", **given))


@torch.no_grad()
def _logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**{k: v for k, v in given.items() if k != "labels"}, use_cache=False).logits
    return logits
