"""GPTQ and AWQ of llm-compressor, on asymmetric grids like ours; all else as the package has it by default.

`options.method` is `gptq` (columns in the order of their activations, 1% damping) or `awq` (20 strengths tried).
"""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from plain_folder import Job, block_linears, dequantized, job, write
from torch import Tensor, nn
from torch.utils.data import DataLoader

BATCH = 8


def main() -> None:
    """Quantize the job's model."""
    asked = job()
    model = asked.load()
    if not torch.cuda.is_available():  # AWQ of this release pins what it keeps, which ends in an error without a GPU
        IntermediatesCache.pin_memory = lambda self, batch_index: None
    oneshot(model=model, dataset=_batches(asked.calibration()), recipe=_recipe(asked))
    # a tied head may have been untied: what is not in the blocks stays as it was
    found = {
        name: tensor for name, tensor in model.state_dict().items() if ".layers." in name and name.endswith(".weight")
    }
    for name, linear in block_linears(model).items():
        found[f"{name}.weight"] = _weight(linear)
    write(asked, found, asked.stored_bits(zero_point=asked.bits), "llmcompressor", "compressed-tensors")


def _recipe(asked: Job) -> list[object]:
    weights = QuantizationArgs(
        num_bits=asked.bits, type="int", symmetric=False, strategy="group", group_size=asked.group_size
    )
    given = {"config_groups": {"all": QuantizationScheme(targets=["Linear"], weights=weights)}, "ignore": ["lm_head"]}
    if asked.options["method"] == "gptq":
        return [GPTQModifier(**given)]
    return [AWQModifier(), QuantizationModifier(**given)]


def _batches(windows: Tensor) -> DataLoader[dict[str, Tensor]]:
    samples = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]
    return DataLoader(samples, batch_size=BATCH)  # type: ignore[arg-type]


def _weight(linear: nn.Linear) -> Tensor:
    """Return the weight as the stored integers give it."""
    scheme = linear.quantization_scheme.weights
    scale, zero_point = linear.weight_scale.data.float(), linear.weight_zero_point.data
    codes = quantize(linear.weight.data.float(), scale, zero_point, scheme)
    return dequantized(codes, scale, zero_point)


if __name__ == "__main__":
    main()
