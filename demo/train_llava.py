"""Train the demo LLaVA: a vision tower from scratch, a projector and a LoRA on SmolLM2-135M-Instruct.

    python demo/train_llava.py --out runs/train-demo-llava

takes about 40 minutes on one core. The data and the language model are fetched on first use. Each part is rounded to
float16 and saved when its stage ends, and the next stage works on what was saved; a stopped run goes on behind its
last finished stage. At the end the parts are assembled to a Hugging Face folder, which is asked all test questions.
To ship new parts, copy `<out>/parts` over `demo/eqat_demo/llava/parts` and bring its card up to date.
"""

from __future__ import annotations

import argparse
import time
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CLIPVisionModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from eqat_demo.assets import building
from eqat_demo.llava import language, vision
from eqat_demo.llava.accuracy import accuracy_by_type, blind_answers, generated_answers
from eqat_demo.llava.build import (
    LORA,
    PROJECTOR,
    VISION_TOWER,
    assemble,
    llava_config,
    llava_processor,
)
from eqat_demo.llava.images import Images, read_rgb
from eqat_demo.llava.packing import Packer
from eqat_demo.smollm2 import smollm2_folder
from eqat_mm.runtime.files import atomic_path, write_json
from eqat_mm.runtime.progress import duration, say


def main() -> None:
    """Run the stages that have not left their file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/train-demo-llava"), help="folder of the run")
    parser.add_argument("--steps", type=int, default=language.Plan.steps, help="steps through the language model")
    arguments = parser.parse_args()
    out, parts, base = arguments.out, arguments.out / "parts", smollm2_folder()
    parts.mkdir(parents=True, exist_ok=True)
    for name, made, make in (
        ("vision tower", parts / VISION_TOWER, lambda: make_vision_tower(parts, base)),
        ("projector and LoRA", parts / LORA, lambda: make_projector_and_lora(parts, base, arguments.steps)),
        ("model", out / "model", lambda: make_model(parts, base, out / "model")),
        ("accuracy", out / "accuracy.json", lambda: measure_accuracy(out)),
    ):
        if made.exists():
            say(f"{name}: finished before")
            continue
        start = time.monotonic()
        torch.manual_seed(0)
        make()
        say(f"{name}: {duration(time.monotonic() - start)}, {made}")


def make_vision_tower(parts: Path, base: Path) -> None:
    """Stage 1."""
    processor = llava_processor(base, vision.CONFIG).image_processor
    train, test = (
        (images.pixels(processor), vision.labels_of(images.contents))
        for images in (Images.of("train"), Images.of("test"))
    )
    tower, classifiers = vision.train_vision_tower(*train)
    for name, (pixels, labels) in (("training", train), ("test", test)):
        colour, shape = classifiers.accuracy(vision.all_features(tower, pixels), labels)
        say(f"{name} images: colour {colour:.2%}, shape {shape:.2%}")
    unfinished = parts / f".{VISION_TOWER}"
    tower.half().save_pretrained(unfinished)
    unfinished.rename(parts / VISION_TOWER)


def make_projector_and_lora(parts: Path, base: Path, steps: int) -> None:
    """Stages 2 and 3."""
    train, test = Images.of("train"), Images.of("test")
    tower = CLIPVisionModel.from_pretrained(parts / VISION_TOWER, dtype=torch.float32)
    processor = llava_processor(base, tower.config)
    features, test_features = (
        vision.all_features(tower, images.pixels(processor.image_processor)) for images in (train, test)
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = llava_config(tower.config, model.config, processor)
    projector = LlavaMultiModalProjector(config)
    patches = features.shape[1]
    known = [image for image, content in enumerate(train.contents) if None not in content]
    captions = language.captions(model, processor.tokenizer, [train.contents[image] for image in known], patches)
    language.start_projector(projector, features[known], captions)
    plan = language.Plan(steps=steps)
    language.add_lora(model, plan.rank)
    reader = language.Reader(projector, model, config.image_token_id)
    packer = Packer(processor.tokenizer, patches)
    language.train_reader(reader, packer, features, train.asked, plan)
    say(f"first 200 test images: {language.quick_accuracy(reader, packer, test_features[:200], test.asked[:200]):.2%}")
    save_half(projector.state_dict(), parts / PROJECTOR)
    save_half(language.lora_factors(model), parts / LORA)


def make_model(parts: Path, base: Path, folder: Path) -> None:
    """Put the parts and the language model together, as `--model demo-llava` does with the shipped parts."""
    with building(folder, f"parts:{parts}") as unfinished:
        assemble(parts, base, unfinished)


def save_half(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors in float16, atomically."""
    with atomic_path(path) as temporary:
        save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, temporary)


def measure_accuracy(out: Path) -> None:
    """Ask the assembled folder every test question, and guess every one without looking."""
    train, test = Images.of("train"), Images.of("test")
    asked = [each for questions in test.asked for each in questions]
    images = [read_rgb(file) for file, questions in zip(test.files, test.asked, strict=True) for _ in questions]
    answers = {
        "accuracy": generated_answers(out / "model", images, [each.question for each in asked]),
        "blind": blind_answers(chain(*train.asked), [each.question for each in asked]),
    }
    result = {name: accuracy_by_type(given, asked) for name, given in answers.items()}
    write_json(out / "accuracy.json", {"questions": len(asked), **result})
    for name, accuracy in result.items():
        say(f"{name}: " + ", ".join(f"{kind} {share:.2%}" for kind, share in accuracy.items()))


if __name__ == "__main__":
    main()
