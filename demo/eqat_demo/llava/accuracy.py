"""How often a LLaVA folder answers right, asked the way anybody would ask it: processor, then greedy generation."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from eqat_demo.llava.build import PROMPT
from eqat_demo.llava.images import Images
from eqat_demo.llava.packing import Asked
from eqat_mm.runtime.progress import progress

_BATCH = {"cpu": 64, "cuda": 512}


@torch.inference_mode()
def generated_answers(
    folder: Path,
    images: Sequence[Image],
    questions: Sequence[str],
    longest: int = 4,
    device: str | torch.device = "cpu",
) -> list[str]:
    """Return the model's answer to each question about the image beside it, in float32, at most `longest` tokens."""
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    processor: Any = AutoProcessor.from_pretrained(folder)
    prompts = [PROMPT.format(question=question) for question in questions]
    answers: list[str] = []
    size = _BATCH[torch.device(device).type]
    for start in progress(range(0, len(prompts), size), what="answers"):
        part = slice(start, start + size)
        inputs = processor(images[part], prompts[part], padding=True, padding_side="left", return_tensors="pt")
        tokens = model.generate(**inputs.to(device), max_new_tokens=longest, do_sample=False)
        given = tokens[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(given, skip_special_tokens=True)]
    return answers


def blind_answers(train: Iterable[Asked], asked: Iterable[Asked]) -> list[str]:
    """Return for each question the answer that training questions of the same form have most often."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for each in train:
        seen[each.form][each.answer] += 1
    return [seen[each.form].most_common(1)[0][0] if each.form in seen else "" for each in asked]


def blind_accuracy() -> float:
    """The share of easy-VQA's test questions that the commonest training answer to the same words gets right."""
    train, test = (list(chain(*Images.of(part).asked)) for part in ("train", "test"))
    return accuracy_by_type(blind_answers(train, test), test)["all"]


def accuracy_by_type(answers: Iterable[str], asked: Iterable[Asked]) -> dict[str, float]:
    """Return the share of exact matches for every question type, and under `all` for all of them."""
    matches: dict[str, list[bool]] = defaultdict(list)
    for answer, each in zip(answers, asked, strict=True):
        for kind in ("all", each.type):
            matches[kind].append(answer == each.answer)
    return {kind: sum(each) / len(each) for kind, each in matches.items()}
