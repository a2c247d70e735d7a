"""Stages 2 and 3: a projector and a LoRA teach the language model to read the vision tower's features.

Stage 2 starts the projector near words that the language model knows: it regresses the patches onto the embeddings of
words for them. Stage 3 trains it together with the LoRA, through the language model, on the
answers only. The LoRA covers all linears of the decoder blocks: the base model was dequantized from 4 bits, and a
linear that nothing is added to would still lie on its 4-bit grid, too easy a case for a quantizer.

The vision tower is frozen, so both stages read features computed once.

Axes: N images, P patches, E features (128), D hidden size of the language model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from eqat_demo.llava.descent import Descent, images_of_step
from eqat_demo.llava.packing import IGNORED, Asked, Batch, Packer
from eqat_mm.runtime.precision import Precision, autocast, resolve
from eqat_mm.runtime.progress import progress, say
from eqat_mm.runtime.seeding import generator

_STEPS_PER_LINE = 25


@dataclass(frozen=True)
class Plan:
    """How long and how fast stage 3 learns.

    Attributes:
        steps: optimizer steps.
        images: images of one step.
        questions: questions about each of them.
        rank: rank of the LoRA.
        lora_lr: peak learning rate of the LoRA.
        projector_lr: peak learning rate of the projector.
        seed: of the order of images and questions.
        compiled: by torch.compile, which needs a C++ compiler: two thirds of the time.
    """

    steps: int = 500
    images: int = 5
    questions: int = 6
    rank: int = 8
    lora_lr: float = 1e-3
    projector_lr: float = 5e-4
    seed: int = 0
    compiled: bool = False


class Reader(nn.Module):
    """A projector and the language model behind it, fed with features instead of pixels."""

    def __init__(
        self, projector: nn.Module, language: PreTrainedModel, image_token_id: int, precision: Precision = "auto"
    ) -> None:
        super().__init__()
        self.projector, self.language, self.image_token_id = projector, language, image_token_id
        self.device: torch.device = language.device
        self.precision = resolve(precision, self.device)

    def forward(self, features_NPE: Tensor, batch: Batch, chosen: Tensor) -> Tensor:
        """Return the logits of a batch about N images at `chosen` positions, in float32: (positions, vocabulary)."""
        batch, features_NPE = batch.to(self.device), features_NPE.to(self.device)
        with autocast(self.precision, self.device):
            words = self.language.get_input_embeddings()(batch.ids)
            is_image = (batch.ids == self.image_token_id)[..., None]
            inputs = words.masked_scatter(is_image, self.projector(features_NPE).to(words.dtype))
            decoder: Any = self.language.get_decoder()
            hidden = decoder(
                inputs_embeds=inputs, attention_mask=batch.mask(), position_ids=batch.positions, use_cache=False
            ).last_hidden_state
            logits: Tensor = self.language.get_output_embeddings()(hidden[chosen.to(self.device)])
        return logits.float()


def start_projector(projector: Any, features_NPE: Tensor, captions_NPD: Tensor, steps: int = 400) -> None:
    """Standardise the features inside `linear_1`, then regress the outputs onto the captions."""
    seen = features_NPE.flatten(0, 1)
    with torch.no_grad():
        projector.linear_1.weight.div_(seen.std(0))
        projector.linear_1.bias.sub_(projector.linear_1.weight @ seen.mean(0))
    group = {"params": list(projector.parameters()), "lr": 1e-3}
    descent = Descent(group, steps=steps, warmup=steps // 10, clip=math.inf)
    for _ in progress(range(steps), what="projector"):
        drawn = torch.randint(len(features_NPE), (64,))
        loss = functional.mse_loss(projector(features_NPE[drawn]), captions_NPD[drawn]) / captions_NPD.var()
        descent.step(loss)
    say(f"projector: {loss.item():.1%} of the variance of the captions is left")


def add_lora(language: PreTrainedModel, rank: int) -> None:
    """Freeze the model and put a LoRA beside every linear of its decoder blocks."""
    language.requires_grad_(False)
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"),
        language,
    )


@torch.no_grad()
def load_lora(language: PreTrainedModel, factors: dict[str, Tensor]) -> None:
    """Put factors, as `lora_factors` returns them, into the LoRA that was added.

    Raises:
        RuntimeError: of another rank.
        KeyError: of other linears.
    """
    for path, linear in _lora_layers(language):
        linear.lora_A["default"].weight.copy_(factors[f"{path}.lora_A"])
        linear.lora_B["default"].weight.copy_(factors[f"{path}.lora_B"].float() / linear.scaling["default"])


def lora_factors(language: PreTrainedModel) -> dict[str, Tensor]:
    """Return `<path>.lora_A` (rank, inputs) and `<path>.lora_B` (outputs, rank) of every linear; its update is B A."""
    factors = {}
    for path, linear in _lora_layers(language):
        factors[f"{path}.lora_A"] = linear.lora_A["default"].weight.detach()
        factors[f"{path}.lora_B"] = linear.lora_B["default"].weight.detach() * linear.scaling["default"]
    return factors


def _lora_layers(language: PreTrainedModel) -> list[tuple[str, Any]]:
    return [(path, module) for path, module in language.named_modules() if isinstance(module, LoraLayer)]


def train_reader(
    reader: Reader,
    packer: Packer,
    features_NPE: Tensor,
    asked_N: Sequence[Sequence[Asked]],
    plan: Plan,
    kept: Path | None = None,
) -> None:
    """Train the projector and the LoRA on the answers.

    Args:
        reader: to be trained, with its LoRA.
        packer: of its prompts.
        features_NPE: of all images.
        asked_N: questions about each.
        plan: how long and how fast.
        kept: file of what a stopped training goes on from.
    """
    lora = [parameter for parameter in reader.language.parameters() if parameter.requires_grad]
    descent = Descent(
        {"params": lora, "lr": plan.lora_lr},
        {"params": list(reader.projector.parameters()), "lr": plan.projector_lr},
        steps=plan.steps,
        warmup=plan.steps // 20,
        weight_decay=0.0,
        kept=kept,
    )
    if plan.compiled:
        compile_blocks(reader.language)
    losses = []
    for step in descent.steps("language"):
        drawn = images_of_step(len(features_NPE), step, plan.images, plan.seed).tolist()
        drawn.sort(key=lambda image: len(asked_N[image]))  # short pieces side by side share a row
        batch = packer.batch([draw_questions(asked_N[image], plan.questions, plan.seed + step) for image in drawn])
        chosen = batch.targets != IGNORED
        logits = reader(features_NPE[drawn], batch, chosen)
        loss = functional.cross_entropy(logits, batch.targets[chosen].to(logits.device))
        descent.step(loss)
        losses.append(loss.item())
        if (step + 1) % _STEPS_PER_LINE == 0:
            last = losses[-_STEPS_PER_LINE:]
            say(f"language step {step + 1}: loss {sum(last) / len(last):.4f}")


def compile_blocks(language: Any) -> None:
    """Compile the decoder blocks, all of them by one graph for batches of any size."""
    for block in language.get_decoder().layers:
        block.compile(dynamic=True)


@torch.no_grad()
def quick_accuracy(
    reader: Reader, packer: Packer, features_NPE: Tensor, asked_N: Sequence[Sequence[Asked]], images: int = 5
) -> float:
    """Return the share of questions whose first answer token is the likeliest, asking `images` images at a time."""
    right = total = 0
    for start in range(0, len(asked_N), images):
        batch = packer.batch(asked_N[start : start + images])
        chosen = batch.first_of_answers()
        logits = reader(features_NPE[start : start + images], batch, chosen)
        right += int((logits.argmax(-1).cpu() == batch.targets[chosen]).sum())
        total += len(logits)
    return right / total


def draw_questions(asked: Sequence[Asked], count: int, seed: int = 0) -> list[Asked]:
    """Draw questions about an image by their weights, none twice."""
    weights, draw = torch.tensor([each.weight for each in asked]), generator(seed, "questions", asked[0].question)
    return [asked[index] for index in torch.multinomial(weights, min(count, len(asked)), generator=draw).tolist()]
