"""Stage 1: a small CLIP vision tower that sees the colour and the shape on an easy-VQA image.

It is trained from scratch, as a classifier. LLaVA reads the second-to-last layer without its class token, so that is
where the classifiers sit; the last layer stays as it was initialised.

Axes: N images, P patches (16), E features (128), H and W rows and columns of pixels (64).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from eqat_demo.easy_vqa import COLOURS, SHAPES
from eqat_demo.llava.descent import Descent, images_of_step

_IMAGE_SIZE, _PATCH_SIZE = 64, 16
CONFIG = CLIPVisionConfig(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=5,
    num_attention_heads=4,
    image_size=_IMAGE_SIZE,
    patch_size=_PATCH_SIZE,
)
_FEATURE_LAYER = -2
_UNKNOWN = -100
BATCH = 64
STEPS = 40 * -(-4000 // BATCH)
"""Forty times through the images."""

_LR = 1.5e-3
_WARMUP_STEPS = 150


class Classifiers(nn.Module):
    """Linear classifiers on the features of every patch and on their mean."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.patch = nn.Linear(config.hidden_size, len(COLOURS) + len(SHAPES))
        self.mean = nn.Linear(config.hidden_size, len(COLOURS) + len(SHAPES))
        self.position = nn.Linear(config.hidden_size, (_IMAGE_SIZE // _PATCH_SIZE) ** 2)

    def loss(self, features_NPE: Tensor, labels_N2: Tensor) -> Tensor:
        """Return the summed mean cross entropies of colour and shape, from patches and mean, and of the position.

        Each patch must also tell where it is. Without that all patches become alike, and the language model
        would see one token 16 times.
        """
        count, patches, _ = features_NPE.shape
        per_patch_MK, labels_M2 = self.patch(features_NPE).flatten(0, 1), labels_N2.repeat_interleave(patches, 0)
        position_MP, positions_M = self.position(features_NPE).flatten(0, 1), torch.arange(patches).repeat(count)
        return (
            _contents_loss(per_patch_MK, labels_M2)
            + _contents_loss(self.mean(features_NPE.mean(1)), labels_N2)
            + functional.cross_entropy(position_MP, positions_M)
        )

    def accuracy(self, features_NPE: Tensor, labels_N2: Tensor) -> tuple[float, float]:
        """Return the shares of known colours and of known shapes that the mean of the patches tells."""
        guessed_N2 = torch.stack([each.argmax(-1) for each in _split(self.mean(features_NPE.mean(1)))], dim=1)
        colour, shape = ((guessed_N2 == labels_N2).sum(0) / (labels_N2 != _UNKNOWN).sum(0)).tolist()
        return colour, shape


def labels_of(contents: Sequence[tuple[str | None, str | None]]) -> Tensor:
    """Return the indices of the colours and shapes: integers of shape (N, 2)."""

    def index(name: str | None, names: tuple[str, ...]) -> int:
        return _UNKNOWN if name is None else names.index(name)

    return torch.tensor([[index(colour, COLOURS), index(shape, SHAPES)] for colour, shape in contents])


def train_vision_tower(
    pixels_NCHW: Tensor, labels_N2: Tensor, steps: int = STEPS, kept: Path | None = None
) -> tuple[CLIPVisionModel, Classifiers]:
    """Train a tower from scratch; return it with the classifiers on top of it.

    Args:
        pixels_NCHW: the images.
        labels_N2: their colours and shapes.
        steps: of 64 images each.
        kept: file of what a stopped training goes on from.
    """
    tower, classifiers = fresh_tower(CONFIG), Classifiers(CONFIG)
    parameters = [*tower.parameters(), *classifiers.parameters()]
    descent = Descent({"params": parameters, "lr": _LR}, steps=steps, warmup=_WARMUP_STEPS, kept=kept)
    shifted = ShiftedImages(pixels_NCHW)
    for step in descent.steps("vision tower"):
        batch = images_of_step(len(labels_N2), step, BATCH)
        descent.step(classifiers.loss(patch_features(tower, shifted.draw(batch)), labels_N2[batch]))
    return tower, classifiers


def patch_features(tower: CLIPVisionModel, pixels_NCHW: Tensor) -> Tensor:
    """Return what LLaVA hands to its projector: (N, P, E) of the second-to-last layer, class token dropped."""
    features: Tensor = tower(pixels_NCHW, output_hidden_states=True).hidden_states[_FEATURE_LAYER][:, 1:]
    return features


@torch.no_grad()
def all_features(tower: CLIPVisionModel, batches: Iterable[Tensor]) -> Tensor:
    """Return `patch_features` of many images, a batch [B, C, H, W] at a time, on the CPU."""
    return torch.cat([patch_features(tower, batch.to(tower.device)).cpu() for batch in batches])


class ShiftedImages:
    """Images with the shape moved to anywhere in the frame, and mirrored half of the time.

    The background has one colour, so rolling rows and columns moves the shape and leaves no seam, as long as the
    shape does not cross an edge.
    """

    def __init__(self, pixels_NCHW: Tensor) -> None:
        self.pixels_NHWC = pixels_NCHW.permute(0, 2, 3, 1).contiguous()
        background = pixels_NCHW[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].median(dim=2).values
        shape_NHW = (pixels_NCHW - background[..., None, None]).abs().amax(1) > 0.05
        self.rows_free = _free_edges(shape_NHW.any(2))
        self.columns_free = _free_edges(shape_NHW.any(1))

    def draw(self, batch_B: Tensor) -> Tensor:
        """Return the images of these indices, each moved anew: (B, C, H, W)."""
        rows = self._moved(self.rows_free, batch_B)
        columns = self._moved(self.columns_free, batch_B)
        mirrored = torch.rand(len(batch_B)) < 0.5
        columns[mirrored] = columns[mirrored].flip(1)
        moved_BHWC = self.pixels_NHWC[batch_B[:, None, None], rows[:, :, None], columns[:, None, :]]
        return moved_BHWC.permute(0, 3, 1, 2)

    def _moved(self, free_N2: Tensor, batch_B: Tensor) -> Tensor:
        before, after = free_N2[batch_B].unbind(1)
        shift = (torch.rand(len(batch_B)) * (before + after + 1)).long() - before
        size = self.pixels_NHWC.shape[1]
        return (torch.arange(size) - shift[:, None]) % size


def _free_edges(occupied_NL: Tensor) -> Tensor:
    """Return how many lines are free before and after the shape: (N, 2)."""
    before = occupied_NL.int().argmax(1)
    after = occupied_NL.flip(1).int().argmax(1)
    return torch.stack([before, after], dim=1)


def fresh_tower(config: CLIPVisionConfig) -> CLIPVisionModel:
    """Return a tower with Xavier initialisation; CLIP's own is so small that training from scratch stalls."""
    tower = CLIPVisionModel(config)
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    nn.init.xavier_uniform_(tower.embeddings.patch_embedding.weight.view(config.hidden_size, -1))
    return tower


def _split(logits: Tensor) -> tuple[Tensor, Tensor]:
    colour, shape = logits.split([len(COLOURS), len(SHAPES)], dim=-1)
    return colour, shape


def _contents_loss(logits_MK: Tensor, labels_M2: Tensor) -> Tensor:
    losses = [
        functional.cross_entropy(logits, labels, ignore_index=_UNKNOWN)
        for logits, labels in zip(_split(logits_MK), labels_M2.unbind(1), strict=True)
    ]
    return losses[0] + losses[1]
