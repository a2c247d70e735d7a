"""A small CLIP vision tower that sees what is in each square of a picture of mini-VQA.

It is trained from scratch on pictures that are drawn while it learns, so it sees none twice. LLaVA reads the
second-to-last layer without its class token, so that is where the classifiers sit.

Axes: N pictures, P patches (36, the squares), E features (128), L labels of a patch.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from eqat_demo.llava.descent import Descent
from eqat_demo.llava.vision import fresh_tower, patch_features
from eqat_demo.mini_vqa.bars import random_chart
from eqat_demo.mini_vqa.drawing import drawn
from eqat_demo.mini_vqa.labels import KINDS, labels_of
from eqat_demo.mini_vqa.pictures import Content
from eqat_demo.mini_vqa.scenes import GRID, SIDE, SQUARE, random_scene
from eqat_demo.mini_vqa.words import random_word
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.seeding import derive_seed

CONFIG = CLIPVisionConfig(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=SIDE,
    patch_size=SQUARE,
)
_SIZES = [len(values) for values in KINDS.values()]
_BATCH = 64
_LR = 1.5e-3
_STEPS_PER_LINE = 100


class Classifiers(nn.Module):
    """Linear classifiers of what a patch shows, and of where it is."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.shown = nn.Linear(config.hidden_size, sum(_SIZES))
        self.place = nn.Linear(config.hidden_size, GRID * GRID)

    def loss(self, features_NPE: Tensor, labels_NPL: Tensor) -> Tensor:
        """Return the sum of mean cross entropies: of each label, where something is and where not, and of the place.

        Most patches are empty; without the halves of the sum the tower would say so of all for long.
        """
        filled_NP = labels_NPL.any(-1)
        place = functional.cross_entropy(self.place(features_NPE).flatten(0, 1), _places(len(features_NPE)))
        parts = [self._told(features_NPE[chosen], labels_NPL[chosen]) for chosen in (filled_NP, ~filled_NP)]
        return place + parts[0] + parts[1]

    def _told(self, features_ME: Tensor, labels_ML: Tensor) -> Tensor:
        logits = self.shown(features_ME).split(_SIZES, dim=-1)
        return sum(map(functional.cross_entropy, logits, labels_ML.unbind(-1)), torch.zeros(()))

    def right(self, features_NPE: Tensor, labels_NPL: Tensor) -> dict[str, float]:
        """Return the share of filled patches of which each label is told right, and of all patches all labels."""
        guessed = torch.stack([each.argmax(-1) for each in self.shown(features_NPE).split(_SIZES, dim=-1)], dim=-1)
        same_NPL, filled_NP = guessed == labels_NPL, labels_NPL.any(-1)
        shares = same_NPL[filled_NP].float().mean(0).tolist()
        return dict(zip(KINDS, shares, strict=True)) | {"all of a patch": float(same_NPL.all(-1).float().mean())}


def random_contents(count: int, *purpose: str | int) -> list[Content]:
    """Draw what is on pictures for the tower alone: scenes, charts and words that are not held out."""
    random = Random(derive_seed(0, "mini-VQA vision", *purpose))
    kinds = (random_scene, random_scene, random_chart, lambda random: random_word(random, held_out=False))
    return [random.choice(kinds)(random) for _ in range(count)]


def pixels_of(contents: list[Any], processor: Any) -> Tensor:
    """Return pictures as the image processor of the model hands them on: float32 [N, 3, H, W]."""
    rgb = torch.from_numpy(np.stack([np.asarray(drawn(content)) for content in contents])).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(each)[:, None, None] for each in (processor.image_mean, processor.image_std))
    return (rgb / 255 - mean) / std


def train_vision_tower(processor: Any, steps: int, kept: Path | None = None) -> CLIPVisionModel:
    """Train a tower from scratch, and say how well it sees.

    Args:
        processor: of the model's images.
        steps: of 64 pictures each.
        kept: file of what a stopped training goes on from.
    """
    tower, classifiers = fresh_tower(CONFIG), Classifiers(CONFIG)
    group = {"params": [*tower.parameters(), *classifiers.parameters()], "lr": _LR}
    descent = Descent(group, steps=steps, warmup=steps // 20, kept=kept)
    for step in descent.steps("vision tower"):
        contents = random_contents(_BATCH, "train", step)
        loss = classifiers.loss(patch_features(tower, pixels_of(contents, processor)), _labels(contents))
        descent.step(loss)
        if (step + 1) % _STEPS_PER_LINE == 0:
            say(f"vision step {step + 1}: loss {loss.item():.4f}")
    contents = random_contents(500, "test")
    with torch.no_grad():
        seen = classifiers.right(patch_features(tower, pixels_of(contents, processor)), _labels(contents))
    say("new pictures: " + ", ".join(f"{kind} {share:.2%}" for kind, share in seen.items()))
    return tower


def _labels(contents: list[Any]) -> Tensor:
    return torch.stack([labels_of(content) for content in contents])


def _places(count: int) -> Tensor:
    return torch.arange(GRID * GRID).repeat(count)
