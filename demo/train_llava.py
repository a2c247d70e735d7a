"""Train a demo LLaVA: a vision tower from scratch, a projector and a LoRA on SmolLM2-135M-Instruct.

    python demo/train_llava.py --bed easy-vqa --out runs/train-demo-llava
    python demo/train_llava.py --bed mini-vqa --out runs/train-mini-llava --compiled

The first takes about 40 minutes on one core, the second about an hour and a quarter on two. Data and language model are
fetched or made on first use. Each part is rounded to float16 and saved when its stage ends, and the next stage works on
what was saved. A stopped run goes on when the same command is given again: behind its last finished stage, and within a
stage behind what it kept, every two minutes, in `<out>/*.state`. At the end the parts are assembled to a Hugging Face
folder, which is asked all test questions. `--start` begins with parts instead of nothing: a tower that is kept, a
projector and a LoRA that learn on. To ship new parts, copy `<out>/parts` over `demo/eqat_demo/llava/parts`, or
`demo/eqat_demo/mini_vqa/llava_parts`, and bring the card there up to date.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CLIPVisionModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from eqat_demo.assets import building
from eqat_demo.llava import language, vision
from eqat_demo.llava.accuracy import accuracy_by_type, blind_answers, generated_answers
from eqat_demo.llava.bed import EASY, Bed
from eqat_demo.llava.build import (
    LORA,
    PROJECTOR,
    VISION_TOWER,
    assemble,
    llava_config,
    llava_processor,
    load_projector,
)
from eqat_demo.llava.packing import Packer
from eqat_demo.mini_vqa.bed import MINI
from eqat_demo.smollm2 import smollm2_folder
from eqat_mm.runtime.device import best_device
from eqat_mm.runtime.files import atomic_path, write_json
from eqat_mm.runtime.memory import keep_freed_memory
from eqat_mm.runtime.progress import duration, say

BEDS = {"easy-vqa": EASY, "mini-vqa": MINI}


def main() -> None:
    """Run the stages that have not left their file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bed", choices=BEDS, default="easy-vqa", help="questions that it learns to answer")
    parser.add_argument("--out", type=Path, default=Path("runs/train-demo-llava"), help="folder of the run")
    parser.add_argument("--steps", type=int, help="steps through the language model")
    parser.add_argument("--start", type=Path, help="folder of parts to begin with; take another --seed then")
    parser.add_argument("--seed", type=int, default=0, help="of the order of images and questions")
    parser.add_argument("--images", type=int, help="images of a step")
    parser.add_argument("--rate", type=float, default=1.0, help="what the learning rates are multiplied by")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; of the language model")
    parser.add_argument("--compiled", action="store_true", help="by torch.compile, which needs a C++ compiler")
    parser.add_argument("--vision-steps", type=int, help="steps of the vision tower")
    arguments = parser.parse_args()
    if arguments.start and not (arguments.start / LORA).exists():
        parser.error(f"--start {arguments.start}: no {LORA} there; take the parts of a finished run")
    keep_freed_memory()
    bed = BEDS[arguments.bed]
    steps = arguments.steps or bed.plan.steps
    plan = replace(
        bed.plan,
        steps=steps,
        images=arguments.images or bed.plan.images,
        seed=arguments.seed,
        compiled=arguments.compiled,
        lora_lr=arguments.rate * bed.plan.lora_lr,
        projector_lr=arguments.rate * bed.plan.projector_lr,
    )
    bed = replace(bed, plan=plan, vision_steps=arguments.vision_steps or bed.vision_steps)
    run_stages(bed, arguments.out, smollm2_folder(), arguments.start, best_device(arguments.device))


def run_stages(bed: Bed, out: Path, base: Path, start: Path | None = None, device: str | torch.device = "cpu") -> None:
    """Train for a bed in the folder `out`, on the language model in the folder `base`, with the parts in `start`."""
    parts = out / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    if start is not None:
        shutil.copytree(start / VISION_TOWER, parts / VISION_TOWER, dirs_exist_ok=True)
    stages: tuple[tuple[str, Path, Callable[[], None]], ...] = (
        ("vision tower", parts / VISION_TOWER, lambda: make_vision_tower(bed, out, base)),
        ("projector and LoRA", parts / LORA, lambda: make_projector_and_lora(bed, out, base, start, device)),
        ("model", out / "model", lambda: make_model(parts, base, out / "model")),
        ("accuracy", out / "accuracy.json", lambda: measure_accuracy(bed, out, device)),
    )
    for name, made, make in stages:
        if made.exists():
            say(f"{name}: finished before")
            continue
        began = time.monotonic()
        torch.manual_seed(0)
        make()
        say(f"{name}: {duration(time.monotonic() - began)}, {made}")


def make_vision_tower(bed: Bed, out: Path, base: Path) -> None:
    """Stage 1."""
    processor = llava_processor(base, bed.config).image_processor
    tower = bed.tower(processor, bed.vision_steps, out / "vision.state")
    unfinished = out / "parts" / f".{VISION_TOWER}"
    tower.half().save_pretrained(unfinished)
    unfinished.rename(out / "parts" / VISION_TOWER)


def make_projector_and_lora(bed: Bed, out: Path, base: Path, start: Path | None, device: Any) -> None:
    """Stages 2 and 3."""
    parts, train, test = out / "parts", bed.part("train"), bed.part("test")
    tower: Any = CLIPVisionModel.from_pretrained(parts / VISION_TOWER, dtype=torch.float32).to(device)
    processor = llava_processor(base, tower.config)
    features, test_features = (
        vision.all_features(tower, part.batches(processor.image_processor)) for part in (train, test)
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = llava_config(tower.config, model.config, processor)
    language.add_lora(model, bed.plan.rank)
    if start is None:
        projector = LlavaMultiModalProjector(config)
        known, captions = train.captions(model, processor.tokenizer, features.shape[1])
        language.start_projector(projector, features[known], captions)
    else:
        projector = load_projector(start, config)
        language.load_lora(model, load_file(start / LORA))
    reader = language.Reader(projector.to(device), model.to(device), config.image_token_id)
    packer = Packer(processor.tokenizer, features.shape[1])
    language.train_reader(reader, packer, features, train.asked, bed.plan, out / "language.state")
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


def measure_accuracy(bed: Bed, out: Path, device: Any) -> None:
    """Ask the assembled folder every test question, and guess every one without looking."""
    train, test = bed.part("train"), bed.part("test")
    asked = list(chain(*test.asked))
    images = [image for image, questions in zip(test.images(), test.asked, strict=True) for _ in questions]
    questions = [each.question for each in asked]
    answers = {
        "accuracy": generated_answers(out / "model", images, questions, bed.longest, device),
        "blind": blind_answers(chain(*train.asked), asked),
    }
    result = {name: accuracy_by_type(given, asked) for name, given in answers.items()}
    write_json(out / "accuracy.json", {"questions": len(asked), **result})
    for name, accuracy in result.items():
        say(f"{name}: " + ", ".join(f"{kind} {share:.2%}" for kind, share in accuracy.items()))


if __name__ == "__main__":
    main()
