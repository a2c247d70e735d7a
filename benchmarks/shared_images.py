"""Questions about the same images: answered with the images read once, and read for each question, in turns.

    python benchmarks/shared_images.py --model runs/demo-vlm/w2g64/rtn/model --images 8 --questions 16

Images are noise, questions are made of words, answers are as long as the model makes them. `--pixels` sets the width of
the images, for models that divide them.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from PIL import Image
from timing import interleaved

from eqat_eval.lmms_model import EqatVLM

_TASK = {"max_new_tokens": 8, "do_sample": False}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a vision-language model")
    parser.add_argument("--images", type=int, default=8, help="in a batch")
    parser.add_argument("--questions", type=int, default=16, help="about each")
    parser.add_argument("--pixels", type=int, default=336, help="width and height of an image")
    parser.add_argument("--turns", type=int, default=3, help="each way is timed")
    given = parser.parse_args()
    model = EqatVLM(given.model, batch_size=given.images * given.questions)
    samples = made(model, given.images, given.questions, given.pixels)
    row = model.renderer.inputs(*samples[0])["input_ids"]
    seen = int((row == model.processor.image_token_id).sum())
    print(f"{len(samples)} questions about {given.images} images, {seen} of {len(row)} tokens an image; {model.device}")
    for what in ("answers", "likelihoods"):
        once, each = interleaved(
            [partial(asked, model, samples, what, shares) for shares in (True, False)], given.turns
        )
        print(f"{what}: {once:.2f} s with images read once, {each:.2f} s otherwise, ratio {once / each:.2f}")


def made(model: EqatVLM, images: int, questions: int, pixels: int) -> list[tuple[str, list[Any]]]:
    """Return prompts and their images."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (images, pixels, pixels, 3), dtype=torch.uint8, generator=draw)
    pictures = [Image.fromarray(each.numpy()) for each in noise]
    texts = [f"Is the {'very ' * (at % 5)}large thing left of number {at} red or blue?" for at in range(questions)]
    return [(model.prompt(text, 1), [picture]) for picture in pictures for text in texts]


def asked(model: EqatVLM, samples: list[tuple[str, list[Any]]], what: str, shares: bool) -> None:
    """Answer the questions, or score an answer to each."""
    model.shares_images = shares
    if what == "answers":
        model.generate(samples, _TASK)
    else:
        model.score(samples, ["the large red one"] * len(samples))


if __name__ == "__main__":
    main()
