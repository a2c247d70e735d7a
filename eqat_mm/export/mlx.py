"""MLX: affine groups, weight = scales * code + biases, as mlx-lm and mlx-vlm read them.

Codes are those of the checkpoint, word for word. What changes is the offset: MLX has -z s in place of z.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eqat_mm.export.form import Choices
from eqat_mm.export.hf_folder import (
    Tensors,
    Unchanged,
    common_group,
    no_reader,
    repeated,
    require_known_kind,
    takes_images,
    write_hf_folder,
)
from eqat_mm.export.opened import PackedModel, PackedWeight

GROUPS = (128, 64, 32)
"""Sizes of groups that MLX knows."""

_UNREAD = {
    "qwen3_moe": "mlx-lm 0.32 stacks the weights of these experts without their scales",
    "llava_next": "mlx-vlm 0.7 joins the tiles of an image to the text in another way than LLaVA-1.6 does",
}
_TOWERS = ("llama", "qwen2")


class Mlx(Unchanged):
    """The format; see `eqat_mm.export.form.Format`."""

    name = "mlx"

    def refuse(self, model: PackedModel, choices: Choices) -> None:
        """Check groups and architecture; MLX holds all bits and both grids.

        Raises:
            ExportError: groups that are no multiples of 32, or a model that MLX's packages compute differently.
        """
        common_group(model, self.name, GROUPS)
        require_known_kind(model, self.name, _UNREAD)
        if takes_images(model):
            _require_tower(model)

    def size(self, model: PackedModel, choices: Choices) -> int:
        """Return the bytes of the checkpoint, and of scales and biases in float32: at most so many."""
        group = common_group(model, self.name, GROUPS)
        return model.bytes + sum(8 * each.out_features * each.in_features // group for each in model.weights.values())

    def write(self, model: PackedModel, folder: Path, choices: Choices) -> list[str]:
        """Write shards, index and config.json; return how they are used."""
        group = common_group(model, self.name, GROUPS)
        entry: dict[str, Any] = {"group_size": group, "bits": model.spec.bits, "mode": "affine"}
        if model.spec.table:
            entry |= {
                model.published_name(name): {"group_size": group, "bits": weight.spec.bits}
                for name, weight in model.weights.items()
            }
        settings = dict.fromkeys(_KEYS, entry)
        write_hf_folder(model, folder, lambda each: affine(each, group), settings, model.published_name)
        program = "mlx_vlm generate --image picture.png" if takes_images(model) else "mlx_lm generate"
        return ["```sh", f"python -m {program} --model . --prompt 'What is this?'", "```"]


_KEYS = ("quantization", "quantization_config")
"""mlx-lm reads the first; it writes both."""

FORM = Mlx()


def affine(weight: PackedWeight, group: int) -> Tensors:
    """Return a linear as MLX has it (O outputs, I inputs, N bits).

    Args:
        weight: of the linear.
        group: size of MLX's groups, which divides the weight's own.

    Returns:
        `weight`, uint32 [O, I N / 32]; `scales` and `biases`, [O, I / group], in the first dtype that holds both
        exactly of that of the step sizes, float16 and float32.
    """
    scale = weight.scale()
    offset = scale.float() * -weight.zero_points().float()
    dtypes = (scale.dtype, torch.float16, torch.float32)
    dtype = next(each for each in dtypes if _holds(each, scale) and _holds(each, offset))
    scales, biases = (repeated(value.to(dtype), weight, group) for value in (scale, offset))
    return {"weight": weight.words().view(torch.uint32), "scales": scales, "biases": biases}


def _holds(dtype: torch.dtype, values: Tensor) -> bool:
    return torch.equal(values.to(dtype).float(), values.float())


def _require_tower(model: PackedModel) -> None:
    """Check that mlx-vlm computes the language tower of this LLaVA: it has no settings for what is checked here.

    Raises:
        ExportError: it does not.
    """
    tower, heads = model.text_config, model.text_config.num_attention_heads
    kind = tower.rope_parameters.get("rope_type", "default")
    wrong = [f"a language tower of type {tower.model_type}"] if tower.model_type not in _TOWERS else []
    wrong += (
        [f"heads of {tower.head_dim}"]
        if getattr(tower, "head_dim", None) not in (None, tower.hidden_size // heads)
        else []
    )
    wrong += ["biases in attention"] if getattr(tower, "attention_bias", False) else []
    wrong += [f"rotary embeddings of type {kind}"] if kind not in ("default", "linear") else []
    if wrong:
        allowed = f"towers of type {' or '.join(_TOWERS)} as mlx-vlm 0.7 computes them in a LLaVA"
        raise no_reader(model, "mlx", wrong[0], allowed)
