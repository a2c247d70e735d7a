"""ONNX Runtime: the folder of Olive, from which onnxruntime-genai builds a model whose linears are MatMulNBits."""

from __future__ import annotations

from pathlib import Path

import torch

from eqat_kernels import pack
from eqat_mm.errors import ExportError
from eqat_mm.export.form import Choices
from eqat_mm.export.hf_folder import (
    Tensors,
    Unchanged,
    common_group,
    no_reader,
    repeated,
    require_same_bits,
    write_hf_folder,
)
from eqat_mm.export.opened import PackedModel, PackedWeight

BITS = (2, 4, 8)
BLOCKS = (256, 128, 64, 32)
"""Sizes of the blocks of a row that ONNX Runtime knows."""

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "granite", "smollm3", "phi3")
"""Those of this package that onnxruntime-genai 0.18 builds."""

BUILD = (
    "python -m onnxruntime_genai.models.builder -i . -o onnx -c cache -p int4 -e cpu --extra_options "
    "nodes_to_exclude=/lm_head/MatMul shared_embeddings=false accuracy_level=1"
)
"""Without these options the builder rounds head and embedding to 4 bits, and activations to 8."""


class Onnx(Unchanged):
    """The format; see `eqat_mm.export.form.Format`."""

    name = "onnx"

    def refuse(self, model: PackedModel, choices: Choices) -> None:
        """Check bits, groups and architecture; both grids are held.

        Raises:
            ExportError: bits that differ or have no kernel, groups that are no multiples of 32, or a model that is
                not built.
        """
        require_same_bits(model, self.name)
        if model.spec.bits not in BITS:
            raise ExportError(
                where=f"--to onnx, from {model.folder}",
                given=f"{model.spec.bits} bits",
                allowed="2, 4 and 8 bits, for which ONNX Runtime has kernels",
                do="quantize the model so (--quant.bits), or choose --to mlx or gptq, which hold 3 bits, too",
            )
        kind = model.full_config.model_type
        if kind not in ARCHITECTURES:
            raise no_reader(
                model, self.name, f"{kind}, which onnxruntime-genai 0.18 does not build", ", ".join(ARCHITECTURES)
            )
        common_group(model, self.name, BLOCKS)

    def size(self, model: PackedModel, choices: Choices) -> int:
        """Return the bytes of the checkpoint, and of scales and zero points of all blocks: at most so many."""
        block = common_group(model, self.name, BLOCKS)
        return model.bytes + sum(3 * each.out_features * each.in_features // block for each in model.weights.values())

    def write(self, model: PackedModel, folder: Path, choices: Choices) -> list[str]:
        """Write shards, index and config.json; return how they are used."""
        block = common_group(model, self.name, BLOCKS)
        entry = {
            "quant_method": "olive",
            "bits": model.spec.bits,
            "group_size": block,
            "symmetric": model.spec.symmetric,
            "lm_head": False,
            "embeds": False,
            "overrides": {},
        }
        settings = {"quantization_config": entry}
        write_hf_folder(model, folder, lambda each: blocks(each, block), settings, model.published_name)
        return [
            "```sh",
            BUILD,
            "```",
            "",
            "writes `onnx/model.onnx` and what onnxruntime-genai needs beside it. With these options head and "
            "embedding stay as they are and linears compute in float32.",
        ]


FORM = Onnx()


def blocks(weight: PackedWeight, block: int) -> Tensors:
    """Return a linear as Olive stores it for MatMulNBits (O outputs, I inputs, N bits, B blocks of a row).

    Args:
        weight: of the linear.
        block: size of the blocks, which divides the weight's groups.

    Returns:
        `qweight`, uint8 [O, I N / 8], the packed words as bytes; `scales`, [O, B]; `qzeros`, uint8 [O, ceil(B N / 8)],
        packed along a row. The builder wants them on the symmetric grid, too.
    """
    words = pack(repeated(weight.zero_points(), weight, block), weight.spec.bits)
    count = -(-(weight.in_features // block) * weight.spec.bits // 8)
    return {
        "qweight": weight.words().view(torch.uint8),
        "scales": repeated(weight.scale(), weight, block),
        "qzeros": words.view(torch.uint8)[:, :count].contiguous(),
    }
