"""GPTQ in its second version, as gptqmodel and transformers read it: the words of the checkpoint, transposed.

The first version has zero points less one, and cannot say 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eqat_kernels import dequantize, pack
from eqat_mm.errors import ExportError
from eqat_mm.export.form import Choices
from eqat_mm.export.hf_folder import Tensors, require_known_kind, require_same_bits, write_hf_folder
from eqat_mm.export.opened import PackedModel, PackedWeight

_WHOLE = 32
"""Codes that fill whole words at every width."""

_UNREAD = dict.fromkeys(("mixtral", "qwen3_moe"), "transformers 5 merges the experts of such a block")


class Gptq:
    """The format; see `eqat_mm.export.form.Format`."""

    name = "gptq"

    def refuse(self, model: PackedModel, choices: Choices) -> None:
        """Check shapes and architecture; GPTQ holds all bits, groups and both grids.

        Raises:
            ExportError: bits that differ, rows or columns that do not fill whole words, or a model without a reader.
        """
        require_known_kind(model, self.name, _UNREAD)
        require_same_bits(model, self.name)
        for name, weight in model.weights.items():
            if weight.in_features % _WHOLE or weight.out_features % _WHOLE:
                raise ExportError(
                    where=f"--to gptq, at {name}",
                    given=f"a matrix of {weight.out_features} x {weight.in_features}",
                    allowed=f"multiples of {_WHOLE}: GPTQ has no words that are filled in part",
                    do="choose another --to, or serve the checkpoint itself (docs/formats.md)",
                )

    def changed(self, weight: PackedWeight) -> Tensor:
        """Return which step sizes float16 does not hold, bool [O, G]."""
        scale = weight.scale().float()
        return scale.half().float() != scale

    def held(self, weight: PackedWeight) -> Tensor:
        """Return the weight with step sizes in float16, float32 [O, I]."""
        scale = weight.scale().half().float()
        return dequantize(weight.words(), scale, weight.zero_words(), weight.layout, torch.float32)

    def nearest(self, model: PackedModel) -> str:
        """Say what is held."""
        return "step sizes that float16 holds (--quant.scale_dtype float16)"

    def size(self, model: PackedModel, choices: Choices) -> int:
        """Return the bytes of the checkpoint, of zero points and of the groups of all inputs: at most so many."""
        each = (
            weight.out_features * weight.layout.groups + 4 * weight.in_features for weight in model.weights.values()
        )
        return model.bytes + sum(each)

    def write(self, model: PackedModel, folder: Path, choices: Choices) -> list[str]:
        """Write shards, index and config.json; return how they are used."""
        # with the names of the modules: gptqmodel looks for these, also in a LLaVA
        write_hf_folder(model, folder, transposed, {"quantization_config": _entry(model)}, str)
        return [
            "```python",
            "from gptqmodel import GPTQModel",
            "",
            "model = GPTQModel.load('.', dtype=torch.float16)",
            "```",
            "",
            "Or with transformers' own `from_pretrained`, where gptqmodel and optimum are installed.",
        ]


FORM = Gptq()


def _entry(model: PackedModel) -> dict[str, Any]:
    """Return the `quantization_config` of config.json."""
    spec, blocks = model.spec, next(iter(model.weights)).partition(".layers.")[0]
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": spec.bits,
        "group_size": spec.group_size,
        "sym": spec.symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "block_name_to_quantize": f"{blocks}.layers",
    }


def transposed(weight: PackedWeight) -> Tensors:
    """Return a linear as GPTQ has it (O outputs, I inputs, G groups, N bits).

    Returns:
        `qweight`, int32 [I N / 32, O]; `qzeros`, int32 [G, O N / 32]; `scales`, float16 [G, O]; `g_idx`, int32 [I], the
        group of each input.
    """
    zeros = weight.zero_words()
    qzeros = pack(weight.zero_points().T.contiguous(), weight.spec.bits) if zeros is None else zeros.T
    return {
        "qweight": weight.words().T.contiguous(),
        "qzeros": qzeros.contiguous(),
        "scales": weight.scale().T.half().contiguous(),
        "g_idx": torch.arange(weight.in_features, dtype=torch.int32) // weight.group_size,
    }
